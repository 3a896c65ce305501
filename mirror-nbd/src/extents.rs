//! Where a store has holes: what a client may pass over because it reads as zeroes.
//!
//! Asking the file system can wait for its metadata, so a [`Survey`] is carried out by a worker
//! and never by a mirror's thread. What cannot be told is data: that is always a true answer.

use crate::backend::Descriptor;
use mirror_core::limits::SECTOR;
use mirror_core::types::ByteRange;
use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use std::sync::{Arc, OnceLock};

/// The most extents that one survey tells: as much memory as a small read.
pub const MOST: u32 = 8192;

/// Consecutive bytes of one kind.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    /// How many; never none, and a multiple of [`SECTOR`].
    pub len: u32,
    /// What they are.
    pub kind: Allocation,
}

/// What a store says of a range.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Allocation {
    /// Something may be there.
    Data,
    /// Nothing is there, and it reads as zeroes.
    Hole,
}

/// A question for the extents from the start of a range on, and the place for its answer.
#[derive(Clone, Debug)]
pub struct Survey {
    start: u64,
    len: u32,
    most: u32,
    found: Arc<OnceLock<Vec<Extent>>>,
}

impl Survey {
    /// A question about a range of whole sectors, shorter than 4 GiB and not empty, that at most
    /// so many extents answer.
    pub fn new(range: ByteRange, most: u32) -> Survey {
        Survey {
            start: range.start,
            len: range.len() as u32,
            most: most.clamp(1, MOST),
            found: Arc::default(),
        }
    }

    /// Asks the file system; returns the number of extents.
    pub fn carry_out(&self, file: &Descriptor) -> u32 {
        let end = self.start + u64::from(self.len);
        let extents = survey(file, self.start, end, self.most);
        self.found.get_or_init(|| extents).len() as u32
    }

    /// What was found: at least one extent, together no longer than the range.
    pub fn found(self) -> Vec<Extent> {
        let found = match Arc::try_unwrap(self.found) {
            Ok(found) => found.into_inner(),
            // Its worker is about to let go of it.
            Err(shared) => shared.get().cloned(),
        };
        let unknown = Extent {
            len: self.len,
            kind: Allocation::Data,
        };
        found.unwrap_or_else(|| vec![unknown])
    }
}

/// Seeking moves the descriptor's own offset, which nothing else uses: all I/O on a store says
/// where. So surveys may also run side by side.
fn survey(file: &Descriptor, start: u64, end: u64, most: u32) -> Vec<Extent> {
    let mut extents = Extents::default();
    let mut at = start;
    // Each round makes progress, but may lengthen the last extent instead of adding one.
    for _ in 0..most {
        if at == end || extents.0.len() >= most as usize {
            break;
        }
        let found = match seek(file, at, Whence::SeekData) {
            Ok(found) => found.min(end),
            // Nothing but a hole up to the end of the file, which must not be nearer than ours.
            Err(Errno::ENXIO) if seek(file, 0, Whence::SeekEnd).is_ok_and(|size| size >= end) => {
                end
            }
            Err(_) => {
                extents.add(end - at, Allocation::Data);
                break;
            }
        };
        // A sector with a byte of data in it is data.
        let data = found - found % SECTOR;
        if data > at {
            extents.add(data - at, Allocation::Hole);
            at = data;
            continue;
        }
        let hole = seek(file, found.max(at), Whence::SeekHole).unwrap_or(end);
        let next = hole.next_multiple_of(SECTOR).max(at + SECTOR).min(end);
        extents.add(next - at, Allocation::Data);
        at = next;
    }
    extents.0
}

fn seek(file: &Descriptor, offset: u64, whence: Whence) -> Result<u64, Errno> {
    lseek(file, offset as i64, whence).map(|offset| offset as u64)
}

#[derive(Default)]
struct Extents(Vec<Extent>);

impl Extents {
    fn add(&mut self, len: u64, kind: Allocation) {
        let len = len as u32;
        match self.0.last_mut() {
            Some(last) if last.kind == kind => last.len += len,
            _ => self.0.push(Extent { len, kind }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::fd::OwnedFd;
    use std::os::unix::fs::FileExt;

    const BLOCK: u64 = 64 << 10;

    /// A file of ten blocks with data in these.
    fn sparse(data: &[u64]) -> (File, Descriptor) {
        let file = tempfile::tempfile().expect("a file");
        file.set_len(10 * BLOCK).expect("a size");
        for block in data {
            file.write_all_at(&[1; BLOCK as usize], block * BLOCK)
                .expect("a write");
        }
        let twin = file.try_clone().expect("a second handle");
        (file, Descriptor::from(OwnedFd::from(twin)))
    }

    fn found(file: &Descriptor, range: ByteRange, most: u32) -> Vec<(u64, Allocation)> {
        let survey = Survey::new(range, most);
        let count = survey.carry_out(file);
        let found = survey.found();
        assert_eq!(found.len(), count as usize);
        found
            .into_iter()
            .map(|extent| (u64::from(extent.len), extent.kind))
            .collect()
    }

    #[test]
    fn holes_and_data_alternate_and_end_with_the_range() {
        use Allocation::{Data, Hole};
        let (_, file) = sparse(&[1, 2, 5]);
        let all = found(&file, ByteRange::new(0, 8 * BLOCK), MOST);
        let expected = [
            (BLOCK, Hole),
            (2 * BLOCK, Data),
            (2 * BLOCK, Hole),
            (BLOCK, Data),
            (2 * BLOCK, Hole),
        ];
        assert_eq!(all, expected);
        // Inside one extent, and across a border.
        let inside = ByteRange::new(BLOCK + 512, 1024);
        assert_eq!(found(&file, inside, MOST), [(1024, Data)]);
        let across = ByteRange::new(3 * BLOCK - 512, 1024);
        assert_eq!(found(&file, across, MOST), [(512, Data), (512, Hole)]);
    }

    #[test]
    fn no_more_extents_are_told_than_asked_for() {
        let (_, file) = sparse(&[1, 3, 5]);
        let range = ByteRange::new(0, 10 * BLOCK);
        assert_eq!(found(&file, range, 1), [(BLOCK, Allocation::Hole)]);
        assert_eq!(found(&file, range, 3).len(), 3);
        assert_eq!(found(&file, range, 0).len(), 1, "there is always one");
    }

    #[test]
    fn what_is_punched_or_written_shows_at_once() {
        let (writer, file) = sparse(&[0]);
        let block = ByteRange::new(0, BLOCK);
        assert_eq!(found(&file, block, MOST), [(BLOCK, Allocation::Data)]);
        let mode = crate::backend::Zeroing::PunchHole.mode();
        nix::fcntl::fallocate(&writer, mode, 0, BLOCK as i64).expect("a hole");
        assert_eq!(found(&file, block, MOST), [(BLOCK, Allocation::Hole)]);
        writer.write_all_at(&[2; 512], 0).expect("a write");
        let after = found(&file, block, MOST);
        assert_eq!(after[0].1, Allocation::Data);
    }

    #[test]
    fn what_cannot_be_told_is_data() {
        use Allocation::Data;
        // No offsets at all.
        let (pipe, _writer) = nix::unistd::pipe().expect("a pipe");
        let pipe = Descriptor::from(pipe);
        let range = ByteRange::new(4096, 8192);
        assert_eq!(found(&pipe, range, MOST), [(8192, Data)]);
        // A file that ends before the range does: reading there fails.
        let (_, file) = sparse(&[]);
        let behind = ByteRange::new(9 * BLOCK, 2 * BLOCK);
        assert_eq!(found(&file, behind, MOST), [(2 * BLOCK, Data)]);
        // Never carried out.
        let unknown = Extent {
            len: 8192,
            kind: Data,
        };
        assert_eq!(Survey::new(range, MOST).found(), [unknown]);
    }

    #[test]
    fn borders_within_a_sector_are_data() {
        let file = tempfile::tempfile().expect("a file");
        // No larger than its odd tail: a file system may end a hole anywhere.
        file.write_all_at(b"x", 0).expect("a write");
        file.set_len(1000).expect("a size");
        let file = Descriptor::from(OwnedFd::from(file));
        let all = found(&file, ByteRange::new(0, 512), MOST);
        assert_eq!(all, [(512, Allocation::Data)]);
    }
}
