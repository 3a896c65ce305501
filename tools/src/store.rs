//! Disks and metadata files while no daemon has them: opened, locked, measured.

use crate::occupants::{Kernel, Occupant};
use mirror_core::config::{Metadata, Side};
use mirror_core::error::{ErrorId, Refusal};
use mirror_core::node::MetadataPlace;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;

/// What a store is opened for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// To look.
    Read,
    /// To write metadata.
    Write,
}

/// A block device or regular file that nobody else may use while this lives.
#[derive(Debug)]
pub struct Store {
    file: Flock<File>,
    path: PathBuf,
    metadata: fs::Metadata,
    /// Its length in bytes.
    pub size: u64,
}

impl Store {
    /// Opens and locks a store that exists. A device that is mounted or otherwise claimed, and a
    /// store that a daemon holds, are refused.
    pub fn open(path: &Path, access: Access) -> Result<Store, Refusal> {
        let metadata = fs::metadata(path).map_err(|error| unavailable(path, &error))?;
        let device = metadata.file_type().is_block_device();
        if !device && !metadata.is_file() {
            return Err(Refusal::new(
                ErrorId::StoreUnsupported,
                format!(
                    "{} is no block device and no file; correct the path",
                    path.display()
                ),
            ));
        }
        let mut options = OpenOptions::new();
        options.read(true).write(access == Access::Write);
        if device {
            // On a block device O_EXCL without O_CREAT means: not while it is mounted or claimed.
            options.custom_flags(libc::O_EXCL);
        }
        let file = options.open(path).map_err(|error| {
            let read_only = access == Access::Write && Kernel::running().is_read_only(&metadata);
            match error.raw_os_error() {
                Some(libc::EBUSY) => occupied(path, &Kernel::running().occupants(&metadata)),
                Some(libc::EROFS) => read_only_store(path),
                _ if read_only => read_only_store(path),
                _ => unavailable(path, &error),
            }
        })?;
        // What is checked from here on is checked on the open file: its path may have changed hands.
        let opened = file.metadata().map_err(|error| unavailable(path, &error))?;
        if opened.file_type() != metadata.file_type() {
            let error = io::Error::other("it became something else while it was opened");
            return Err(unavailable(path, &error));
        }
        // Some drivers open a read-only device for writing, and refuse the writes.
        if access == Access::Write && Kernel::running().is_read_only(&opened) {
            return Err(read_only_store(path));
        }
        let mut file = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(
            |(_, errno)| match errno {
                Errno::EWOULDBLOCK => occupied(path, &[]),
                other => unavailable(path, &other.into()),
            },
        )?;
        // Works for files and devices alike.
        let size = file
            .seek(SeekFrom::End(0))
            .map_err(|error| unavailable(path, &error))?;
        Ok(Store {
            file,
            path: path.to_owned(),
            metadata: opened,
            size,
        })
    }

    /// Refuses a store that is in use in a way that its lock does not tell.
    pub fn refuse_occupied(&self) -> Result<(), Refusal> {
        match &Kernel::running().occupants(&self.metadata)[..] {
            [] => Ok(()),
            occupants => Err(occupied(&self.path, occupants)),
        }
    }

    /// The names of the partitions that the kernel knows on it.
    pub fn partitions(&self) -> Vec<String> {
        Kernel::running().partitions(&self.metadata)
    }

    /// Its path, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The open store as another program's standard input.
    pub fn as_input(&self) -> io::Result<Stdio> {
        Ok(self.file.try_clone()?.into())
    }

    /// Creates a sparse file of this size and opens it; refuses one that exists.
    pub fn create(path: &Path, size: u64) -> Result<Store, Refusal> {
        OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
            .and_then(|file| file.set_len(size).and_then(|()| file.sync_all()))
            .map_err(|error| unavailable(path, &error))?;
        sync_directory(path).map_err(|error| unavailable(path, &error))?;
        Store::open(path, Access::Write)
    }

    /// `len` bytes at an offset.
    pub fn read(&self, offset: u64, len: usize) -> Result<Vec<u8>, Refusal> {
        let mut bytes = vec![0; len];
        match self.file.read_exact_at(&mut bytes, offset) {
            Ok(()) => Ok(bytes),
            Err(error) => Err(unavailable(&self.path, &error)),
        }
    }

    /// Writes bytes at an offset; durable only after [`Store::sync`].
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), Refusal> {
        self.file
            .write_all_at(bytes, offset)
            .map_err(|error| unavailable(&self.path, &error))
    }

    /// Makes what was written durable.
    pub fn sync(&self) -> Result<(), Refusal> {
        self.file
            .sync_all()
            .map_err(|error| unavailable(&self.path, &error))
    }
}

/// Where a side's metadata is, in the core's words.
pub fn metadata_place(side: &Side) -> MetadataPlace {
    match side.metadata {
        Metadata::Internal => MetadataPlace::Internal,
        Metadata::External(_) => MetadataPlace::External,
    }
}

fn sync_directory(path: &Path) -> io::Result<()> {
    let parent = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty());
    File::open(parent.unwrap_or(Path::new("/")))?.sync_all()
}

fn occupied(path: &Path, occupants: &[Occupant]) -> Refusal {
    let path = path.display();
    let by: Vec<String> = occupants.iter().map(ToString::to_string).collect();
    let what = if by.is_empty() {
        "another process (a running kagami-mirror, say, or a mount); stop that first".to_owned()
    } else {
        by.join("; ")
    };
    Refusal::new(ErrorId::StoreBusy, format!("{path} is in use: {what}"))
}

fn read_only_store(path: &Path) -> Refusal {
    let path = path.display();
    let remedy = "use another, or make it writable (blockdev --setrw, or a mount with rw)";
    Refusal::new(
        ErrorId::StoreReadOnly,
        format!("{path} is read-only; {remedy}"),
    )
}

fn unavailable(path: &Path, error: &io::Error) -> Refusal {
    let remedy = match error.kind() {
        io::ErrorKind::NotFound => "check the path in the configuration",
        io::ErrorKind::PermissionDenied => "run this as root or as the owner",
        io::ErrorKind::UnexpectedEof => "the store is shorter than its metadata says",
        _ => "check the disk",
    };
    Refusal::new(
        ErrorId::StoreUnavailable,
        format!("{}: {error}; {remedy}", path.display()),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use tempfile::TempDir;

    #[test]
    fn a_new_store_is_sparse_and_locked() {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("disk");
        let store = Store::create(&path, 1 << 30).unwrap();
        assert_eq!(store.size, 1 << 30);
        assert_eq!(
            Store::open(&path, Access::Read).unwrap_err().id,
            ErrorId::StoreBusy
        );
        drop(store);
        assert!(Store::open(&path, Access::Read).is_ok());
        assert_eq!(
            Store::create(&path, 1).unwrap_err().id,
            ErrorId::StoreUnavailable
        );
    }

    #[test]
    fn what_is_no_store() {
        let dir = TempDir::new().unwrap();
        let refusal = Store::open(dir.path(), Access::Read).unwrap_err();
        assert_eq!(refusal.id, ErrorId::StoreUnsupported);
        let refusal = Store::open(&dir.path().join("none"), Access::Read).unwrap_err();
        assert_eq!(refusal.id, ErrorId::StoreUnavailable);
    }
}
