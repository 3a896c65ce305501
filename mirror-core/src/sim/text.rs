//! Values as a script writes them: printed without loss, and read back with a reason when that
//! fails.

use super::fault_kind::FaultKind;
use super::options::{Arbitration, Beginning, Chance, DiskBias, MOST_DRIFT, Pace, Scenario};
use crate::node::MetadataPlace;
use std::fmt::Display;
use std::time::Duration;

/// The longest span that means anything in a run.
const LONGEST: Duration = Duration::from_secs(3600);

/// A value with a form in scripts.
pub(super) trait Text: Sized {
    fn to_text(&self) -> String;
    fn from_text(text: &str) -> Result<Self, String>;
}

/// Parses a whole number.
pub(super) fn number<T: std::str::FromStr>(text: &str) -> Result<T, String> {
    text.parse()
        .map_err(|_| format!("`{text}` is no number in range"))
}

macro_rules! numbers {
    ($($type:ty),*) => {
        $(impl Text for $type {
            fn to_text(&self) -> String {
                self.to_string()
            }

            fn from_text(text: &str) -> Result<$type, String> {
                number(text)
            }
        })*
    };
}

numbers!(u32, u64, usize);

impl Text for bool {
    fn to_text(&self) -> String {
        one_of(&[(true, "yes"), (false, "no")], self)
    }

    fn from_text(text: &str) -> Result<bool, String> {
        among(&[(true, "yes"), (false, "no")], text)
    }
}

/// Spans are printed as [`Duration`] does for people, which keeps every nanosecond.
impl Text for Duration {
    fn to_text(&self) -> String {
        format!("{self:?}")
    }

    fn from_text(text: &str) -> Result<Duration, String> {
        let wrong = || format!("`{text}` is no time like 300ms or 1.5s");
        let unit = text
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .ok_or_else(wrong)?;
        let (amount, unit) = text.split_at(unit);
        let digits = match unit {
            "s" => 9,
            "ms" => 6,
            "µs" | "us" => 3,
            "ns" => 0,
            _ => return Err(wrong()),
        };
        let (whole, fraction) = amount.split_once('.').unwrap_or((amount, ""));
        if whole.is_empty() || fraction.len() > digits || (amount.ends_with('.')) {
            return Err(wrong());
        }
        let scaled: u64 = format!("{whole}{fraction:0<digits$}")
            .parse()
            .map_err(|_| wrong())?;
        let span = Duration::from_nanos(scaled);
        if span > LONGEST {
            return Err(format!("{text} is longer than {LONGEST:?}"));
        }
        Ok(span)
    }
}

macro_rules! words {
    ($type:ty: $($variant:path = $word:literal),*) => {
        impl Text for $type {
            fn to_text(&self) -> String {
                one_of(&[$(($variant, $word)),*], self)
            }

            fn from_text(text: &str) -> Result<$type, String> {
                among(&[$(($variant, $word)),*], text)
            }
        }
    };
}

words!(Scenario: Scenario::SaneOperator = "sane-operator", Scenario::InsaneOperator = "insane-operator");
words!(Arbitration: Arbitration::Unarbitrated = "unarbitrated", Arbitration::Arbitrated = "arbitrated", Arbitration::Wiped = "wiped");
words!(DiskBias: DiskBias::Even = "even", DiskBias::Writes = "writes", DiskBias::Flushes = "flushes", DiskBias::Metadata = "metadata");
words!(Pace: Pace::Steady = "steady", Pace::Single = "single", Pace::Bursts = "bursts");

impl Text for FaultKind {
    fn to_text(&self) -> String {
        self.name().replace(' ', "-")
    }

    fn from_text(text: &str) -> Result<FaultKind, String> {
        let found = FaultKind::ALL.iter().find(|kind| kind.to_text() == text);
        found
            .copied()
            .ok_or_else(|| format!("`{text}` is no kind of fault"))
    }
}

impl Text for Vec<FaultKind> {
    fn to_text(&self) -> String {
        let names: Vec<String> = self.iter().map(FaultKind::to_text).collect();
        if names.is_empty() {
            "none".to_owned()
        } else {
            names.join(",")
        }
    }

    fn from_text(text: &str) -> Result<Vec<FaultKind>, String> {
        match text {
            "none" => Ok(Vec::new()),
            list => list.split(',').map(FaultKind::from_text).collect(),
        }
    }
}

impl Text for [i32; 2] {
    fn to_text(&self) -> String {
        format!("{},{}", self[0], self[1])
    }

    fn from_text(text: &str) -> Result<[i32; 2], String> {
        let wrong = || format!("`{text}` is no pair of drifts like 150,-20 (millionths)");
        let (a, b) = text.split_once(',').ok_or_else(wrong)?;
        let drift = |word: &str| {
            word.parse()
                .ok()
                .filter(|d| (-MOST_DRIFT..=MOST_DRIFT).contains(d))
        };
        Ok([drift(a).ok_or_else(wrong)?, drift(b).ok_or_else(wrong)?])
    }
}

words!(Chance: Chance::Drawn = "drawn", Chance::Fixed = "fixed");
words!(Beginning: Beginning::FullSync = "full-sync", Beginning::AssumeClean = "assume-clean");
words!(MetadataPlace: MetadataPlace::Internal = "internal", MetadataPlace::External = "external");

/// The word for a value.
pub(super) fn one_of<T: PartialEq>(list: &[(T, &str)], value: &T) -> String {
    let found = list.iter().find(|(candidate, _)| candidate == value);
    found.map_or_else(String::new, |(_, word)| (*word).to_owned())
}

/// The value for a word.
pub(super) fn among<T: Clone>(list: &[(T, &str)], text: &str) -> Result<T, String> {
    match list.iter().find(|(_, word)| *word == text) {
        Some((value, _)) => Ok(value.clone()),
        None => Err(format!(
            "`{text}` is none of {}",
            joined(list.iter().map(|(_, word)| word))
        )),
    }
}

fn joined(words: impl Iterator<Item = impl Display>) -> String {
    let words: Vec<String> = words.map(|word| format!("`{word}`")).collect();
    words.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn times_are_read_exactly() {
        for (text, nanos) in [
            ("12.402s", 12_402_000_000),
            ("300ms", 300_000_000),
            ("1.5ms", 1_500_000),
            ("30µs", 30_000),
            ("30us", 30_000),
            ("7ns", 7),
            ("0.000000001s", 1),
        ] {
            let span = Duration::from_text(text).unwrap();
            assert_eq!(span, Duration::from_nanos(nanos), "{text}");
        }
        for text in [
            "",
            "s",
            "3",
            "1.s",
            ".5s",
            "1.5ns",
            "-1s",
            "1h",
            "2 s",
            "99999999999999999999s",
            "3601s",
        ] {
            assert!(Duration::from_text(text).is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn spans_survive_their_text(nanos in 0..3_600_000_000_000u64) {
            let span = Duration::from_nanos(nanos);
            prop_assert_eq!(Duration::from_text(&span.to_text()), Ok(span));
        }
    }
}
