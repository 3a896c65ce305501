//! Unix sockets of the daemon: mode 0660 from their first moment, in place of stale ones, and
//! gone with their listener.

use nix::sys::stat::{Mode, umask};
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use tokio::net::{UnixListener, UnixStream};

/// A socket that is removed when it is dropped.
#[derive(Debug)]
pub struct UnixSocket {
    listener: UnixListener,
    path: PathBuf,
}

impl UnixSocket {
    /// Binds a socket for owner and group. One that is there already is replaced if nobody
    /// listens behind it.
    ///
    /// # Errors
    ///
    /// What the system said; also when something else than a stale socket is in the way.
    pub async fn bind(path: &Path) -> io::Result<UnixSocket> {
        match std::fs::symlink_metadata(path) {
            Ok(found) if found.file_type().is_socket() => {
                if is_in_use(path).await {
                    return Err(io::ErrorKind::AddrInUse.into());
                }
                std::fs::remove_file(path)?;
            }
            Ok(_) => return Err(io::ErrorKind::AlreadyExists.into()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                if let Some(directory) = path.parent() {
                    std::fs::create_dir_all(directory)?;
                }
            }
            Err(error) => return Err(error),
        }
        let before = umask(Mode::from_bits_truncate(0o117));
        let listener = UnixListener::bind(path);
        umask(before);
        Ok(UnixSocket {
            listener: listener?,
            path: path.to_owned(),
        })
    }

    /// The next client.
    ///
    /// # Errors
    ///
    /// What the system said.
    pub async fn accept(&self) -> io::Result<UnixStream> {
        self.listener.accept().await.map(|(stream, _)| stream)
    }
}

impl Drop for UnixSocket {
    fn drop(&mut self) {
        // Whether it is there or not, the next daemon replaces it.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Whether somebody listens there. A listener too busy to take us is one, too.
async fn is_in_use(path: &Path) -> bool {
    match UnixStream::connect(path).await {
        Ok(_) => true,
        Err(error) => !matches!(
            error.kind(),
            io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[tokio::test]
    async fn a_stale_socket_is_replaced_but_nothing_else() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("deep/s.sock");
        drop(UnixSocket::bind(&path).await.expect("binds"));
        assert!(!path.exists(), "a daemon that ends takes it away");
        drop(UnixListener::bind(&path).expect("one that is left behind"));
        assert!(path.exists());
        let _socket = UnixSocket::bind(&path).await.expect("binds again");
        let mode = std::fs::metadata(&path)
            .expect("there")
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o660);
        let file = directory.path().join("file");
        std::fs::write(&file, "precious").expect("written");
        assert!(UnixSocket::bind(&file).await.is_err());
        assert!(file.exists());
    }

    #[tokio::test]
    async fn a_socket_in_use_is_left_to_its_owner() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("s.sock");
        let _theirs = UnixListener::bind(&path).expect("binds");
        let error = UnixSocket::bind(&path).await.expect_err("in use");
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        UnixStream::connect(&path).await.expect("still theirs");
    }
}
