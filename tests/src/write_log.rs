//! What a device was told, in order: the log of QEMU's `blklogwrites` (and of the kernel's
//! dm-log-writes), and the images a power cut may leave of it.
//!
//! A log is a superblock and then entries of one sector each, with the data of a write behind its
//! entry. QEMU logs an operation after carrying it out and before answering it, so the order of
//! entries is that of completion, and whatever was answered is in the log.
//!
//! A flush entry makes every write before it durable, a FUA entry itself. Of the writes since the
//! last flush a power cut keeps any subset, and of one write any subset of its sectors
//! ([`Survivors`]).

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

/// The unit of a log, of tearing and of the format's numbers.
pub const SECTOR: usize = 512;

const MAGIC: u64 = 0x006a_7366_7773_6872;
const VERSION: u64 = 1;
const FLUSH: u64 = 1;
const FUA: u64 = 2;
const DISCARD: u64 = 4;
const MARK: u64 = 8;

/// One entry of a log.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Entry {
    /// The length of the log up to and with this entry.
    pub end: u64,
    /// What it says.
    pub what: Logged,
}

/// What the device was told.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Logged {
    /// A write.
    Write {
        /// Where on the device.
        offset: u64,
        /// Where in the log.
        data: Range<u64>,
        /// Whether it is durable by itself.
        fua: bool,
    },
    /// What completed before is durable.
    Flush,
    /// A range was given up: it may read as before or as zeroes.
    Discard,
    /// A remark of whoever made the log.
    Mark,
}

/// A whole log. Its data stays in its file: a harness that starts thousands of processes should be
/// small, because each start copies its page tables.
#[derive(Debug)]
pub struct WriteLog {
    file: File,
    entries: Vec<Entry>,
    /// Numbers of the flush entries.
    flushes: Vec<usize>,
}

impl WriteLog {
    /// Reads a log.
    ///
    /// # Errors
    ///
    /// When the file is no log, or one that ends within an entry.
    pub fn parse(file: File) -> Result<WriteLog, String> {
        let length = file.metadata().map_err(|error| error.to_string())?.len();
        let header = |at: u64| -> Result<[u64; 4], String> {
            let mut bytes = [0; 32];
            file.read_exact_at(&mut bytes, at)
                .map_err(|error| format!("at byte {at}: {error}"))?;
            let mut fields = bytes.chunks_exact(8);
            Ok([(); 4].map(|()| {
                let field = fields.next().expect("four fields");
                u64::from_le_bytes(field.try_into().expect("8 bytes"))
            }))
        };
        let [magic, version, _, sector_size] = header(0)?;
        if (magic, version, sector_size & 0xffff_ffff) != (MAGIC, VERSION, SECTOR as u64) {
            return Err("not a write log of version 1 with 512-byte sectors".to_owned());
        }
        let mut entries = Vec::new();
        let mut flushes = Vec::new();
        let mut at = SECTOR as u64;
        while at < length {
            let [sector, sectors, flags, _] = header(at)?;
            if flags & !(FLUSH | FUA | DISCARD | MARK) != 0 {
                return Err(format!("entry {} has flags {flags:#x}", entries.len()));
            }
            let len = match flags & (DISCARD | MARK) {
                0 => sectors.checked_mul(SECTOR as u64),
                _ => Some(0),
            };
            let data = at + SECTOR as u64;
            let end = len
                .and_then(|len| data.checked_add(len))
                .filter(|end| *end <= length)
                .ok_or_else(|| format!("entry {} ends behind the log", entries.len()))?;
            // A flush with data is a flush and then a write.
            if flags & FLUSH != 0 {
                flushes.push(entries.len());
                entries.push(Entry {
                    end,
                    what: Logged::Flush,
                });
            }
            let what = match flags {
                _ if flags & MARK != 0 => Some(Logged::Mark),
                _ if flags & DISCARD != 0 => Some(Logged::Discard),
                _ if end > data => Some(Logged::Write {
                    offset: sector * SECTOR as u64,
                    data: data..end,
                    fua: flags & FUA != 0,
                }),
                _ => None,
            };
            entries.extend(what.map(|what| Entry { end, what }));
            at = end;
        }
        Ok(WriteLog {
            file,
            entries,
            flushes,
        })
    }

    /// The entries in order.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The data of a write.
    pub fn data(&self, range: &Range<u64>) -> Vec<u8> {
        let mut bytes = vec![0; (range.end - range.start) as usize];
        self.file
            .read_exact_at(&mut bytes, range.start)
            .expect("a log that was read before");
        bytes
    }

    /// Flush entries within the first `length` bytes.
    pub fn flushes_within(&self, length: u64) -> usize {
        self.flushes
            .partition_point(|flush| self.entries[*flush].end <= length)
    }

    /// Where each stretch between two flushes ends: the length of the log with the last entry
    /// before each flush, and with the flush. Stretches without a write are left out.
    pub fn stretches(&self) -> Vec<Stretch> {
        let mut stretches = Vec::new();
        let mut start = 0;
        for flush in &self.flushes {
            let between = &self.entries[start..*flush];
            if let Some(last) = between.last() {
                stretches.push(Stretch {
                    before: last.end,
                    flushed: self.entries[*flush].end,
                });
            }
            start = flush + 1;
        }
        stretches
    }

    /// Entries within the first `length` bytes.
    fn within(&self, length: u64) -> usize {
        self.entries.partition_point(|entry| entry.end <= length)
    }
}

/// The writes between two flushes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stretch {
    /// The length of the log with the last write and without the flush.
    pub before: u64,
    /// The length of the log with the flush.
    pub flushed: u64,
}

/// Which of the writes that no flush covered a power cut leaves.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Survivors {
    /// None of them.
    Nothing,
    /// All: as if only the process had been killed.
    Everything,
    /// Each write whole or not at all, by chance.
    Writes,
    /// Each sector or not, by chance.
    Sectors,
    /// All but one stretch of writes.
    ButSome,
}

/// A device's durable content as its log goes on, and what a cut leaves of it.
#[derive(Clone, Debug)]
pub struct Durable {
    image: Vec<u8>,
    /// Entries that are in the image.
    applied: usize,
}

impl Durable {
    /// A device that reads as zeroes.
    pub fn blank(size: usize) -> Durable {
        Durable {
            image: vec![0; size],
            applied: 0,
        }
    }

    /// The image a power cut leaves when the log was `length` long. Lengths must not go back from
    /// one call to the next.
    pub fn cut(
        &mut self,
        log: &WriteLog,
        length: u64,
        survivors: Survivors,
        random: &mut fastrand::Rng,
    ) -> Vec<u8> {
        let end = log.within(length);
        let flushed = log.flushes.partition_point(|flush| *flush < end);
        let durable = flushed.checked_sub(1).map_or(0, |last| log.flushes[last]);
        while self.applied < durable {
            apply(&mut self.image, log, self.applied, |_| true);
            self.applied += 1;
        }
        let mut image = self.image.clone();
        let open = durable..end;
        let lost = {
            let from = random.usize(open.start..=open.end);
            from..random.usize(from..=open.end)
        };
        for entry in open {
            match survivors {
                Survivors::Nothing => apply(&mut image, log, entry, |_| false),
                Survivors::Everything => apply(&mut image, log, entry, |_| true),
                Survivors::Writes => {
                    let kept = random.bool();
                    apply(&mut image, log, entry, |_| kept);
                }
                Survivors::Sectors => apply(&mut image, log, entry, |_| random.bool()),
                Survivors::ButSome => {
                    let kept = !lost.contains(&entry);
                    apply(&mut image, log, entry, |_| kept);
                }
            }
        }
        image
    }
}

/// Applies the sectors of a write that `kept` wants, and all of them if it is durable by itself.
fn apply(image: &mut [u8], log: &WriteLog, entry: usize, mut kept: impl FnMut(usize) -> bool) {
    let Logged::Write { offset, data, fua } = &log.entries[entry].what else {
        return;
    };
    let data = log.data(data);
    let target = &mut image[*offset as usize..][..data.len()];
    let sectors = target.chunks_exact_mut(SECTOR);
    for (index, (target, source)) in sectors.zip(data.chunks_exact(SECTOR)).enumerate() {
        if *fua || kept(index) {
            target.copy_from_slice(source);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A log: superblock, then entries as (sector, sectors, flags, fill byte).
    fn log_of(entries: &[(u64, u64, u64, u8)]) -> Vec<u8> {
        let mut bytes = vec![0; SECTOR];
        bytes[..8].copy_from_slice(b"rhswfsj\0");
        bytes[8] = 1;
        bytes[25] = 2;
        for (sector, sectors, flags, fill) in entries {
            let at = bytes.len();
            bytes.resize(at + SECTOR, 0);
            for (field, value) in [sector, sectors, flags].into_iter().enumerate() {
                bytes[at + field * 8..][..8].copy_from_slice(&value.to_le_bytes());
            }
            if flags & (DISCARD | MARK) == 0 {
                bytes.resize(bytes.len() + *sectors as usize * SECTOR, *fill);
            }
        }
        bytes
    }

    fn parse(bytes: &[u8]) -> Result<WriteLog, String> {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(bytes, 0).unwrap();
        WriteLog::parse(file)
    }

    fn story() -> WriteLog {
        parse(&log_of(&[
            (0, 2, 0, 1),
            (0, 0, FLUSH, 0),
            (1, 2, 0, 2),
            (5, 1, FUA, 3),
            (6, 2, DISCARD, 0),
            (0, 4, 0, 4),
            (0, 0, FLUSH, 0),
            (0, 0, FLUSH, 0),
        ]))
        .unwrap()
    }

    fn firsts(image: &[u8]) -> Vec<u8> {
        image.chunks(SECTOR).map(|sector| sector[0]).collect()
    }

    fn cut(log: &WriteLog, entries: usize, survivors: Survivors) -> Vec<u8> {
        let length = log.entries()[entries - 1].end;
        let mut random = fastrand::Rng::with_seed(7);
        firsts(&Durable::blank(8 * SECTOR).cut(log, length, survivors, &mut random))
    }

    #[test]
    fn entries_are_read_as_they_were_written() {
        let log = story();
        assert_eq!(log.entries().len(), 8);
        assert_eq!(log.entries()[0].end, 4 * 512);
        assert_eq!(log.entries()[1].what, Logged::Flush);
        let Logged::Write { offset, data, fua } = &log.entries()[3].what else {
            panic!("a write");
        };
        assert_eq!(
            (*offset, *fua, log.data(data)),
            (5 * 512, true, vec![3; 512])
        );
        assert_eq!(log.flushes_within(4 * 512), 0);
        assert_eq!(log.flushes_within(5 * 512), 1);
        let before = [0, 5].map(|entry| log.entries()[entry].end);
        let flushed = [1, 6].map(|entry| log.entries()[entry].end);
        let stretches = log.stretches();
        assert_eq!(stretches.len(), 2, "two flushes in a row are one");
        for (at, stretch) in stretches.iter().enumerate() {
            assert_eq!((stretch.before, stretch.flushed), (before[at], flushed[at]));
        }
    }

    #[test]
    fn a_cut_keeps_what_was_flushed_and_fua() {
        let log = story();
        assert_eq!(cut(&log, 1, Survivors::Nothing), [0; 8]);
        assert_eq!(
            cut(&log, 1, Survivors::Everything),
            [1, 1, 0, 0, 0, 0, 0, 0]
        );
        assert_eq!(cut(&log, 3, Survivors::Nothing), [1, 1, 0, 0, 0, 0, 0, 0]);
        assert_eq!(cut(&log, 6, Survivors::Nothing), [1, 1, 0, 0, 0, 3, 0, 0]);
        assert_eq!(
            cut(&log, 6, Survivors::Everything),
            [4, 4, 4, 4, 0, 3, 0, 0]
        );
        assert_eq!(cut(&log, 7, Survivors::Nothing), [4, 4, 4, 4, 0, 3, 0, 0]);
    }

    #[test]
    fn every_subset_of_sectors_comes_up() {
        let log = story();
        let mut durable = Durable::blank(8 * SECTOR);
        let mut random = fastrand::Rng::with_seed(1);
        let mut seen = std::collections::BTreeSet::new();
        for _ in 0..2_000 {
            let length = log.entries()[2].end;
            seen.insert(firsts(&durable.cut(
                &log,
                length,
                Survivors::Sectors,
                &mut random,
            )));
        }
        assert_eq!(seen.len(), 4);
        // The device goes on from what was flushed, not from what a cut left.
        let end = log.entries()[7].end;
        let image = durable.cut(&log, end, Survivors::Nothing, &mut random);
        assert_eq!(firsts(&image), [4, 4, 4, 4, 0, 3, 0, 0]);
    }

    #[test]
    fn whole_writes_stay_or_go() {
        let log = story();
        let mut random = fastrand::Rng::with_seed(3);
        for _ in 0..200 {
            let length = log.entries()[2].end;
            let mut durable = Durable::blank(8 * SECTOR);
            let image = firsts(&durable.cut(&log, length, Survivors::Writes, &mut random));
            assert!(image[1..3] == [1, 0] || image[1..3] == [2, 2]);
        }
    }

    #[test]
    fn what_is_no_log_is_refused() {
        assert!(parse(&[]).is_err());
        assert!(parse(&[0; 4096]).is_err());
        let mut short = log_of(&[(0, 2, 0, 1)]);
        short.truncate(short.len() - 1);
        assert!(parse(&short).is_err());
        assert!(parse(&log_of(&[])).is_ok());
        let mut wild = log_of(&[(0, 0, 0, 0)]);
        wild[SECTOR + 8..SECTOR + 16].fill(0xff);
        assert!(parse(&wild).is_err());
        assert!(parse(&log_of(&[(0, 1, 1 << 20, 0)])).is_err());
    }
}
