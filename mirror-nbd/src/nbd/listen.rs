//! Where NBD clients come in: a Unix socket or loopback TCP, per mirror.

use crate::mailbox::Letter;
use crate::mirror::Mirror;
use crate::nbd::negotiate::{Outcome, negotiate};
use crate::nbd::server::MAX_CLIENTS;
use crate::unix_socket;
use mirror_core::config::NbdAddress;
use mirror_core::error::{ErrorId, Refusal};
use nix::sys::socket::{setsockopt, sockopt};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};

/// How long a client may negotiate.
const NEGOTIATION: Duration = Duration::from_secs(30);

enum Listener {
    Unix(UnixListener),
    Tcp(TcpListener),
}

enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

/// Opens a mirror's NBD address, if it has one, and accepts clients from then on.
///
/// # Errors
///
/// [`ErrorId::ListenFailed`].
pub async fn serve(mirror: Arc<Mirror>) -> Result<(), Refusal> {
    let Some(address) = &mirror.side().nbd else {
        return Ok(());
    };
    let listener = match address {
        NbdAddress::Unix(path) => unix_socket::bind(path).map(Listener::Unix),
        NbdAddress::Tcp(address) => TcpListener::bind(address).await.map(Listener::Tcp),
    };
    let listener = listener.map_err(|error| {
        let place = match address {
            NbdAddress::Unix(path) => path.display().to_string(),
            NbdAddress::Tcp(address) => address.to_string(),
        };
        Refusal::new(
            ErrorId::ListenFailed,
            format!(
                "NBD socket {place} of mirror {}: {error}",
                mirror.config.name
            ),
        )
    })?;
    tokio::spawn(accept(listener, Arc::clone(&mirror)));
    Ok(())
}

async fn accept(listener: Listener, mirror: Arc<Mirror>) {
    let places = Arc::new(Semaphore::new(MAX_CLIENTS));
    loop {
        let accepted = match &listener {
            Listener::Unix(listener) => listener.accept().await.map(|(s, _)| Stream::Unix(s)),
            Listener::Tcp(listener) => listener.accept().await.map(|(s, _)| Stream::Tcp(s)),
        };
        let stream = match accepted {
            Ok(stream) => stream,
            Err(error) => {
                log::warn!("{}: accepting a client: {error}", mirror.config.name);
                sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
            continue;
        };
        let mirror = Arc::clone(&mirror);
        tokio::spawn(async move {
            match timeout(NEGOTIATION, welcome(stream, &mirror)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => log::debug!("{}: negotiation: {error}", mirror.config.name),
                Err(_) => log::debug!("{}: negotiation took too long", mirror.config.name),
            }
            drop(place);
        });
    }
}

async fn welcome(stream: Stream, mirror: &Mirror) -> io::Result<()> {
    let (fd, pid) = match stream {
        Stream::Unix(mut stream) => {
            let pid = stream.peer_cred()?.pid();
            if !passes(&mut stream, mirror).await? {
                return Ok(());
            }
            let stream = stream.into_std()?;
            stream.set_nonblocking(false)?;
            (OwnedFd::from(stream), pid)
        }
        Stream::Tcp(mut stream) => {
            stream.set_nodelay(true)?;
            if !passes(&mut stream, mirror).await? {
                return Ok(());
            }
            let stream = stream.into_std()?;
            stream.set_nonblocking(false)?;
            setsockopt(&stream, sockopt::KeepAlive, &true)?;
            (OwnedFd::from(stream), None)
        }
    };
    mirror.post(Letter::Guest { fd, pid });
    Ok(())
}

async fn passes<S>(stream: &mut S, mirror: &Mirror) -> io::Result<bool>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    Ok(negotiate(stream, mirror).await? == Outcome::Transmission)
}
