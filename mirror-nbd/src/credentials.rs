//! Who is at the other end of a Unix socket, and whether they may command the daemon.

use nix::unistd::geteuid;
use std::io;
use std::mem::size_of_val;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use tokio::net::UnixStream;

/// Whether a client is root, the daemon's own user, or in the group of the socket.
///
/// # Errors
///
/// The connection is gone.
pub fn may_control(stream: &UnixStream, socket: &Path) -> io::Result<bool> {
    let peer = stream.peer_cred()?;
    if peer.uid() == 0 || peer.uid() == geteuid().as_raw() {
        return Ok(true);
    }
    let group = std::fs::metadata(socket)?.gid();
    Ok(peer.gid() == group || groups(stream)?.contains(&group))
}

/// The supplementary groups that a client had when it connected.
fn groups(stream: &impl AsFd) -> io::Result<Vec<libc::gid_t>> {
    let mut groups = vec![0; 1024];
    loop {
        let mut len = size_of_val(groups.as_slice()) as libc::socklen_t;
        // SAFETY: `groups` has `len` bytes to write to, and both outlive the call.
        let result = unsafe {
            libc::getsockopt(
                stream.as_fd().as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERGROUPS,
                groups.as_mut_ptr().cast(),
                &raw mut len,
            )
        };
        let count = len as usize / size_of::<libc::gid_t>();
        if result == 0 {
            groups.truncate(count);
            return Ok(groups);
        }
        let error = io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::ERANGE) || count <= groups.len() {
            return Err(error);
        }
        groups.resize(count, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::unistd::getgroups;

    #[tokio::test]
    async fn we_may_control_ourselves() {
        let (ours, _theirs) = UnixStream::pair().expect("a pair");
        assert!(may_control(&ours, Path::new("/")).expect("alive"));
        let mut expected: Vec<u32> = getgroups()
            .expect("groups")
            .into_iter()
            .map(|gid| gid.as_raw())
            .collect();
        let mut found = groups(&ours).expect("groups");
        expected.sort_unstable();
        found.sort_unstable();
        assert_eq!(found, expected);
    }
}
