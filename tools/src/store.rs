//! Disks and metadata files while no daemon has them: opened, locked, measured.

use mirror_core::config::{Metadata, Side};
use mirror_core::error::{ErrorId, Refusal};
use mirror_core::node::MetadataPlace;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

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
            let in_use = error.raw_os_error() == Some(libc::EBUSY);
            if in_use {
                busy(path)
            } else {
                unavailable(path, &error)
            }
        })?;
        let mut file = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(
            |(_, errno)| match errno {
                Errno::EWOULDBLOCK => busy(path),
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
            size,
        })
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

fn busy(path: &Path) -> Refusal {
    Refusal::new(
        ErrorId::StoreBusy,
        format!(
            "{} is in use by another process (a running kagami-mirror, or a mount); stop that first",
            path.display()
        ),
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
