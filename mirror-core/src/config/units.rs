//! Durations and sizes as people write them.

use std::time::Duration;
use thiserror::Error;

/// Why a duration or size is not understood.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum UnitError {
    /// Not a number with a unit of time.
    #[error(
        "`{0}` is not a duration; write a whole number and ms, s or m, like \"500ms\" or \"2s\""
    )]
    Duration(String),
    /// Not a number with a unit of size.
    #[error(
        "`{0}` is not a size; write a whole number and KiB, MiB, GiB or TiB, like \"4KiB\" or \"1GiB\""
    )]
    Size(String),
}

/// Parses a duration like `500ms`, `2s` or `1m`.
///
/// # Errors
///
/// [`UnitError::Duration`] for anything else, also for what is too long to count.
pub fn parse_duration(text: &str) -> Result<Duration, UnitError> {
    number_and_unit(text)
        .and_then(|(number, unit)| match unit {
            "ms" => Some(Duration::from_millis(number)),
            "s" => Some(Duration::from_secs(number)),
            "m" => number.checked_mul(60).map(Duration::from_secs),
            _ => None,
        })
        .ok_or_else(|| UnitError::Duration(excerpt(text)))
}

/// Parses a size like `512B`, `4KiB`, `1GiB`, or plain bytes.
///
/// # Errors
///
/// [`UnitError::Size`] for anything else, also for what does not fit 64 bits.
pub fn parse_size(text: &str) -> Result<u64, UnitError> {
    number_and_unit(text)
        .and_then(|(number, unit)| {
            let shift = match unit {
                "" | "B" => 0,
                "KiB" => 10,
                "MiB" => 20,
                "GiB" => 30,
                "TiB" => 40,
                _ => return None,
            };
            number.checked_mul(1 << shift)
        })
        .ok_or_else(|| UnitError::Size(excerpt(text)))
}

/// The beginning of a foreign text, on one line, to be shown in a message.
pub(super) fn excerpt(text: &str) -> String {
    const SHOWN: usize = 80;
    let mut shown: String = text
        .chars()
        .take(SHOWN)
        .flat_map(char::escape_debug)
        .collect();
    if text.chars().nth(SHOWN).is_some() {
        shown.push('…');
    }
    shown
}

fn number_and_unit(text: &str) -> Option<(u64, &str)> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    Some((number.parse().ok()?, unit))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        assert_eq!(parse_duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(parse_duration("2s"), Ok(Duration::from_secs(2)));
        assert_eq!(parse_duration("1m"), Ok(Duration::from_secs(60)));
        for bad in [
            "",
            "2",
            "s",
            "-1s",
            "1.5s",
            " 2s",
            "2 s",
            "2S",
            "2h",
            "99999999999999999999s",
            "18446744073709551615m",
        ] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn sizes() {
        assert_eq!(parse_size("512"), Ok(512));
        assert_eq!(parse_size("512B"), Ok(512));
        assert_eq!(parse_size("4KiB"), Ok(4096));
        assert_eq!(parse_size("64MiB"), Ok(64 << 20));
        assert_eq!(parse_size("1GiB"), Ok(1 << 30));
        assert_eq!(parse_size("2TiB"), Ok(2 << 40));
        for bad in [
            "",
            "KiB",
            "4kib",
            "4KB",
            "4K",
            "-4KiB",
            "1.5GiB",
            "4 KiB",
            "99999999999TiB",
        ] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }
}
