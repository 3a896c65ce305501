//! Sizes, spans and whole states of a mirror for the eyes of a person.

use mirror_core::control::{Direction, MirrorStatus, ResyncStatus, VerifyState, VerifyStatus};

/// A size with three digits or so: `0 B`, `512 B`, `1.5 MiB`, `474 GiB`.
pub fn size(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut scaled = bytes as f64 / 1024.0;
    let mut unit = 0;
    while scaled >= 999.5 && unit + 1 < UNITS.len() {
        scaled /= 1024.0;
        unit += 1;
    }
    let unit = UNITS[unit];
    if scaled >= 99.95 || scaled.fract() == 0.0 {
        format!("{scaled:.0} {unit}")
    } else {
        format!("{scaled:.1} {unit}")
    }
}

/// `1 mirror`, `2 mirrors`.
pub fn count(number: usize, what: &str) -> String {
    let plural = if number == 1 { "" } else { "s" };
    format!("{number} {what}{plural}")
}

/// A span of seconds: `5 s`, `3 min 20 s`, `2 h 05 min`.
pub fn span(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {:02} s", seconds / 60, seconds % 60),
        _ => format!("{} h {:02} min", seconds / 3600, seconds / 60 % 60),
    }
}

/// `COUNTER:` and enough of the id to tell generations apart.
pub fn generation(full: &str) -> String {
    match full.split_once(':') {
        Some((counter, id)) => {
            let short: String = id.chars().take(8).collect();
            format!("{counter}:{short}")
        }
        None if full.is_empty() => "none".to_owned(),
        None => full.to_owned(),
    }
}

/// The state of a mirror in one line: role, disks, link.
pub fn headline(status: &MirrorStatus) -> String {
    format!(
        "{}  {}/{}  {}/{}  {}",
        status.name, status.role, status.peer_role, status.disk, status.peer_disk, status.link
    )
}

/// All of a mirror's state, a paragraph without a final newline.
pub fn paragraph(status: &MirrorStatus) -> String {
    let mut lines = vec![headline(status)];
    let holders = match status.holders.as_slice() {
        [] => "nobody".to_owned(),
        names => names.join(", "),
    };
    lines.push(format!(
        "    size {}, generation {}, held by {holders}, {}",
        size(status.size_bytes),
        generation(&status.generation),
        status.arbitration,
    ));
    if status.dirty_bytes > 0 || status.unsettled_bytes > 0 {
        lines.push(format!(
            "    {} out of sync, {} not yet settled",
            size(status.dirty_bytes),
            size(status.unsettled_bytes)
        ));
    }
    let counters = &status.counters;
    if counters.reads + counters.writes > 0 {
        lines.push(format!(
            "    {} written, {} read, {} in flight, longest stall {} ms",
            size(counters.written_bytes),
            size(counters.read_bytes),
            counters.in_flight,
            counters.max_stall_ms
        ));
    }
    if let Some(resync) = &status.resync {
        lines.push(format!("    {}", resync_line(resync)));
    }
    if let Some(verify) = &status.verify {
        lines.push(format!("    {}", verify_line(verify)));
    }
    lines.extend(
        status
            .reasons
            .iter()
            .map(|reason| format!("    ! {reason}")),
    );
    lines.join("\n")
}

/// A resync in one line, with a bar.
pub fn resync_line(resync: &ResyncStatus) -> String {
    let towards = match resync.direction {
        Direction::Source => "to the peer",
        Direction::Target => "from the peer",
    };
    let pace = match (resync.paused, resync.eta_seconds) {
        (true, _) => "paused".to_owned(),
        (false, Some(left)) => {
            format!(
                "{}/s, {} left",
                size(resync.rate_bytes_per_second),
                span(left)
            )
        }
        (false, _) => format!("{}/s", size(resync.rate_bytes_per_second)),
    };
    format!(
        "resync {towards} {} {} of {}, {} sent, {pace}",
        bar(resync.done_bytes, resync.total_bytes),
        size(resync.done_bytes),
        size(resync.total_bytes),
        size(resync.sent_bytes),
    )
}

/// A verify in one line, with a bar while it runs.
pub fn verify_line(verify: &VerifyStatus) -> String {
    let found = match verify.different_bytes {
        0 => "no differences".to_owned(),
        bytes => format!("{} differ", size(bytes)),
    };
    let (done, total) = (size(verify.done_bytes), size(verify.total_bytes));
    match verify.state {
        VerifyState::Complete => format!("verify: {total} compared, {found}"),
        VerifyState::Stopped => {
            format!(
                "verify stopped at {done} of {total}: {}; {found}",
                verify.cause
            )
        }
        VerifyState::Running => {
            let bar = bar(verify.done_bytes, verify.total_bytes);
            let rate = size(verify.rate_bytes_per_second);
            let left = verify
                .eta_seconds
                .map(|left| format!(", {} left", span(left)))
                .unwrap_or_default();
            format!("verify {bar} {done} of {total}, {rate}/s{left}, {found}")
        }
    }
}

/// `[=====>----]  52 %`; nothing done while it is not known how much there is to do.
fn bar(done: u64, total: u64) -> String {
    const WIDTH: usize = 24;
    let share = if total == 0 {
        0.0
    } else {
        (done as f64 / total as f64).min(1.0)
    };
    // Rounded down: only what is complete looks complete.
    let filled = (share * WIDTH as f64) as usize;
    let mut bar = "=".repeat(filled);
    if filled < WIDTH {
        bar.push('>');
        bar.push_str(&"-".repeat(WIDTH - filled - 1));
    }
    format!("[{bar}] {:>3} %", (share * 100.0) as u32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use mirror_core::control::Counters;
    use mirror_core::types::{DiskState, LinkState, Role};

    #[test]
    fn sizes() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (1 << 20, "1 MiB"),
            ((1 << 20) - 1, "1.0 MiB"),
            (150 << 20, "150 MiB"),
            (u64::MAX, "16 EiB"),
        ] {
            assert_eq!(size(bytes), text);
        }
    }

    #[test]
    fn counts() {
        assert_eq!(count(1, "mirror"), "1 mirror");
        assert_eq!(count(0, "mirror"), "0 mirrors");
    }

    #[test]
    fn spans() {
        assert_eq!(span(0), "0 s");
        assert_eq!(span(200), "3 min 20 s");
        assert_eq!(span(7500), "2 h 05 min");
    }

    #[test]
    fn bars() {
        assert_eq!(bar(0, 0), "[>-----------------------]   0 %");
        assert_eq!(bar(0, 10), "[>-----------------------]   0 %");
        assert_eq!(bar(999, 1000), "[=======================>]  99 %");
        assert_eq!(bar(u64::MAX, 1), "[========================] 100 %");
    }

    #[test]
    fn a_mirror_in_the_middle_of_a_resync() {
        let status = MirrorStatus {
            name: "r0".to_owned(),
            role: Role::Primary,
            peer_role: Role::Secondary,
            disk: DiskState::UpToDate,
            peer_disk: DiskState::Inconsistent,
            link: LinkState::Connected,
            generation: "3:0123456789abcdef0123456789abcdef".to_owned(),
            holders: vec!["a".to_owned()],
            size_bytes: 1 << 30,
            dirty_bytes: 512 << 20,
            unsettled_bytes: 4096,
            resync: Some(ResyncStatus {
                direction: Direction::Source,
                done_bytes: 512 << 20,
                total_bytes: 1 << 30,
                sent_bytes: 1 << 20,
                rate_bytes_per_second: 100 << 20,
                eta_seconds: Some(5),
                paused: false,
            }),
            reasons: vec!["the peer was away".to_owned()],
            counters: Counters {
                writes: 1,
                written_bytes: 4096,
                ..Counters::default()
            },
            ..MirrorStatus::default()
        };
        assert_eq!(
            paragraph(&status),
            "\
r0  Primary/Secondary  UpToDate/Inconsistent  Connected
    size 1 GiB, generation 3:01234567, held by a, unarbitrated
    512 MiB out of sync, 4 KiB not yet settled
    4 KiB written, 0 B read, 0 in flight, longest stall 0 ms
    resync to the peer [============>-----------]  50 % 512 MiB of 1 GiB, 1 MiB sent, 100 MiB/s, 5 s left
    ! the peer was away"
        );
    }

    #[test]
    fn a_mirror_of_which_nothing_is_known() {
        let status = MirrorStatus {
            name: "r0".to_owned(),
            ..MirrorStatus::default()
        };
        assert_eq!(
            paragraph(&status),
            "r0  Secondary/Unknown  Diskless/Unknown  StandAlone\n    \
             size 0 B, generation none, held by nobody, unarbitrated"
        );
    }
}
