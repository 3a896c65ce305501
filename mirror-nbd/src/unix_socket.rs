//! Unix sockets of the daemon: mode 0660 from their first moment, and in place of stale ones.

use nix::sys::stat::{Mode, umask};
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use tokio::net::UnixListener;

/// Binds a socket for owner and group. What is there already is replaced if it is a socket: the
/// lock of the run directory makes sure that no other daemon of this node lives behind it.
///
/// # Errors
///
/// What the system said; also when something else than a socket is in the way.
pub fn bind(path: &Path) -> io::Result<UnixListener> {
    match std::fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() => std::fs::remove_file(path)?,
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
    listener
}

/// Removes the socket of a daemon that ends.
pub fn remove(path: &Path) {
    // Whether it is there or not, the next daemon replaces it.
    let _ = std::fs::remove_file(path);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[tokio::test]
    async fn a_stale_socket_is_replaced_but_nothing_else() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("deep/s.sock");
        drop(bind(&path).expect("binds"));
        drop(bind(&path).expect("binds again"));
        let mode = std::fs::metadata(&path)
            .expect("there")
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o660);
        let file = directory.path().join("file");
        std::fs::write(&file, "precious").expect("written");
        assert!(bind(&file).is_err());
        assert!(file.exists());
    }
}
