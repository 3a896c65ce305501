//! The store under a mirror: opened, locked and probed once, by the descriptors that do the I/O.
//!
//! The lock is on the very descriptor that writes, so that no second daemon, `kagami create` or
//! other careful program can touch the disk while this one may.

use crate::backend::{Descriptor, Operation};
use crate::buffers::{ALIGNMENT, Pool};
use crate::extents::Survey;
use mirror_core::config::{Metadata, Side};
use mirror_core::error::{ErrorId, Refusal};
use mirror_core::types::ByteRange;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, Flock, FlockArg, OFlag, fcntl};
use nix::sys::statfs::{FUSE_SUPER_MAGIC, FsType, TMPFS_MAGIC, fstatfs};
use nix::unistd::{Whence, lseek};
use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;

/// The largest alignment of offsets and lengths that guests' requests always have.
const SECTOR: u32 = mirror_core::limits::SECTOR as u32;

/// The open store of one replica.
#[derive(Debug)]
pub struct Store {
    /// Guest data, and the metadata too where it is internal.
    pub data: Descriptor,
    /// Metadata of its own place.
    pub external: Option<Descriptor>,
    /// Bytes of the data store.
    pub size: u64,
    /// Whether data bypasses the page cache.
    pub direct: bool,
    /// Whether the kernel makes a single write durable when asked to.
    pub durable_writes: bool,
}

impl Store {
    /// Opens and locks what a side's configuration names.
    ///
    /// # Errors
    ///
    /// [`ErrorId::StoreUnavailable`], [`ErrorId::StoreBusy`] or [`ErrorId::StoreUnsupported`].
    pub fn open(side: &Side) -> Result<Store, Refusal> {
        let data = open(&side.disk)?;
        let external = match &side.metadata {
            Metadata::Internal => None,
            Metadata::External(path) => Some(open(path)?),
        };
        Ok(Store {
            size: data.size,
            direct: data.direct,
            durable_writes: data.durable_writes
                && external.as_ref().is_none_or(|store| store.durable_writes),
            data: data.descriptor,
            external: external.map(|store| store.descriptor),
        })
    }

    /// Where metadata is.
    pub fn metadata(&self) -> &Descriptor {
        self.external.as_ref().unwrap_or(&self.data)
    }

    /// What can be asked about the data.
    pub fn outline(&self) -> Outline {
        let cached = !self.direct && !self.data.is_in_memory();
        Outline {
            data: self.data.clone(),
            caching: if cached {
                Caching::Kernel
            } else {
                Caching::None
            },
        }
    }
}

/// The data store for those who ask about it and touch none of its data.
#[derive(Clone, Debug)]
pub struct Outline {
    data: Descriptor,
    caching: Caching,
}

/// Where a store's data is before it is read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Caching {
    /// In memory already, or never in the kernel's cache.
    None,
    /// In the kernel's page cache, if it was read or asked for.
    Kernel,
}

impl Outline {
    /// Where a range has holes, told in so many extents at most.
    pub fn map(&self, range: ByteRange, most: u32) -> Operation {
        Operation::Map {
            file: self.data.clone(),
            survey: Survey::new(range, most),
        }
    }

    /// How a range, shorter than 4 GiB, is had at hand; `None` where that is no use.
    pub fn prefetch(&self, range: ByteRange) -> Option<Operation> {
        (self.caching == Caching::Kernel).then(|| Operation::Prefetch {
            file: self.data.clone(),
            offset: range.start,
            len: range.len() as u32,
        })
    }
}

struct Opened {
    descriptor: Descriptor,
    size: u64,
    direct: bool,
    durable_writes: bool,
}

fn open(path: &Path) -> Result<Opened, Refusal> {
    let refuse =
        |id: ErrorId, what: String| Refusal::new(id, format!("{}: {what}", path.display()));
    let unavailable = |error: std::io::Error| match Errno::try_from(error) {
        Ok(Errno::EBUSY) => refuse(ErrorId::StoreBusy, busy()),
        Ok(errno) => refuse(ErrorId::StoreUnavailable, errno.desc().to_owned()),
        Err(error) => refuse(ErrorId::StoreUnavailable, error.to_string()),
    };

    let kind = std::fs::metadata(path).map_err(unavailable)?.file_type();
    let block = kind.is_block_device();
    if !block && !kind.is_file() {
        let what = "neither a block device nor a regular file".to_owned();
        return Err(refuse(ErrorId::StoreUnsupported, what));
    }
    // Without O_CREAT, O_EXCL claims a block device from other holders, mounts among them.
    let exclusive = if block { libc::O_EXCL } else { 0 };
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(exclusive | libc::O_CLOEXEC | libc::O_NOCTTY)
        .open(path)
        .map_err(unavailable)?;
    let file =
        Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
            Errno::EWOULDBLOCK => refuse(ErrorId::StoreBusy, busy()),
            errno => refuse(ErrorId::StoreUnavailable, errno.desc().to_owned()),
        })?;
    let size = lseek(&*file, 0, Whence::SeekEnd).map_err(|errno| unavailable(errno.into()))?;
    let kind = fstatfs(&*file).map(|stat| stat.filesystem_type());
    let in_memory = kind.is_ok_and(is_in_memory);
    let direct = !in_memory && go_direct(&file);
    Ok(Opened {
        descriptor: Descriptor::store(file, in_memory),
        size: size as u64,
        direct,
        // FUSE forgets RWF_DSYNC where a direct write is asynchronous, as with io_uring: the write
        // completes and no fsync follows.
        durable_writes: kind != Ok(FUSE_SUPER_MAGIC),
    })
}

fn busy() -> String {
    "in use by another process (a daemon, a mount, or a kagami command); end that first".to_owned()
}

/// Whether a file system of this kind keeps its files in memory.
fn is_in_memory(kind: FsType) -> bool {
    // From linux/magic.h; nix does not name it.
    const RAMFS_MAGIC: FsType = FsType(0x8584_58f6);
    [TMPFS_MAGIC, RAMFS_MAGIC].contains(&kind)
}

/// Turns direct I/O on where sectors may be read and written with it.
fn go_direct(file: &File) -> bool {
    let Ok(flags) = fcntl(file, FcntlArg::F_GETFL) else {
        return false;
    };
    let flags = OFlag::from_bits_retain(flags);
    if dio_alignment(file) == DioAlignment::Refused
        || fcntl(file, FcntlArg::F_SETFL(flags | OFlag::O_DIRECT)).is_err()
    {
        return false;
    }
    if sector_reads_work(file) {
        return true;
    }
    let _ = fcntl(file, FcntlArg::F_SETFL(flags));
    false
}

#[derive(PartialEq, Eq, Debug)]
enum DioAlignment {
    Fine,
    Refused,
    Unknown,
}

fn dio_alignment(file: &File) -> DioAlignment {
    // SAFETY: a statx buffer is plain data for which all zeroes is a valid value.
    let mut stat: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: the path is an empty C string, as AT_EMPTY_PATH asks for, and `stat` outlives the
    // call.
    let result = unsafe {
        libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            &raw mut stat,
        )
    };
    if result != 0 || stat.stx_mask & libc::STATX_DIOALIGN == 0 {
        return DioAlignment::Unknown;
    }
    let (memory, offset) = (stat.stx_dio_mem_align, stat.stx_dio_offset_align);
    if memory > 0 && memory as usize <= ALIGNMENT && offset > 0 && offset <= SECTOR {
        DioAlignment::Fine
    } else {
        DioAlignment::Refused
    }
}

/// What the kernel says of alignment is young (6.1) and not told by every file system; a trial
/// tells.
fn sector_reads_work(file: &File) -> bool {
    let mut buffer = Pool::new().fresh(ALIGNMENT);
    let sector = SECTOR as usize;
    [0, u64::from(SECTOR)].into_iter().all(|offset| {
        file.read_at(&mut buffer.bytes_mut()[..sector], offset)
            .is_ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn side(disk: &Path) -> Side {
        Side {
            node: "a".to_owned(),
            disk: disk.to_owned(),
            metadata: Metadata::Internal,
            nbd: None,
        }
    }

    #[test]
    fn a_store_is_locked_while_it_is_open() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        file.as_file().set_len(1 << 20).expect("a size");
        let store = Store::open(&side(file.path())).expect("opens");
        assert_eq!(store.size, 1 << 20);
        let again = Store::open(&side(file.path())).expect_err("locked");
        assert_eq!(again.id, ErrorId::StoreBusy);
        drop(store);
        Store::open(&side(file.path())).expect("free again");
    }

    #[test]
    fn what_is_no_store_is_refused() {
        let directory = tempfile::tempdir().expect("a directory");
        let refusal = Store::open(&side(directory.path())).expect_err("a directory");
        assert_eq!(refusal.id, ErrorId::StoreUnsupported);
        let missing = directory.path().join("missing");
        let refusal = Store::open(&side(&missing)).expect_err("missing");
        assert_eq!(refusal.id, ErrorId::StoreUnavailable);
        let refusal = Store::open(&side(Path::new("/dev/null"))).expect_err("a device of bytes");
        assert_eq!(refusal.id, ErrorId::StoreUnsupported);
    }
}
