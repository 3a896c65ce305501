//! Where NBD clients come in: a Unix socket or loopback TCP, per mirror.

use crate::mailbox::Letter;
use crate::mirror::Mirror;
use crate::nbd::dialect::Dialect;
use crate::nbd::negotiate::{Outcome, negotiate};
use crate::nbd::server::MAX_CLIENTS;
use crate::unix_socket::UnixSocket;
use mirror_core::config::NbdAddress;
use mirror_core::error::{ErrorId, Refusal};
use nix::sys::socket::{setsockopt, sockopt};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};

/// How long a client may negotiate.
const NEGOTIATION: Duration = Duration::from_secs(30);

/// When an address that could not be had is tried again.
const RETRY: Duration = Duration::from_secs(1);

enum Listener {
    Unix(UnixSocket),
    Tcp(TcpListener),
}

enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

/// Opens a mirror's NBD address and accepts clients there. A place that cannot be had now is
/// tried again, so that one mirror's trouble is not the others'.
pub async fn serve(mirror: Arc<Mirror>) {
    let Some(address) = &mirror.side().nbd else {
        return;
    };
    let mut told = false;
    let listener = loop {
        match open(address).await {
            Ok(listener) => break listener,
            Err(error) if !told => {
                let what = format!("NBD socket {}: {error}", place(address));
                let refusal = Refusal::new(ErrorId::ListenFailed, what);
                log::error!("{}: {refusal}; trying again", mirror.config.name);
                told = true;
            }
            Err(_) => {}
        }
        sleep(RETRY).await;
    };
    accept(listener, Arc::clone(&mirror)).await;
}

async fn open(address: &NbdAddress) -> io::Result<Listener> {
    match address {
        NbdAddress::Unix(path) => UnixSocket::bind(path).await.map(Listener::Unix),
        NbdAddress::Tcp(address) => TcpListener::bind(address).await.map(Listener::Tcp),
    }
}

fn place(address: &NbdAddress) -> String {
    match address {
        NbdAddress::Unix(path) => path.display().to_string(),
        NbdAddress::Tcp(address) => address.to_string(),
    }
}

async fn accept(listener: Listener, mirror: Arc<Mirror>) {
    let places = Arc::new(Semaphore::new(MAX_CLIENTS));
    loop {
        let accepted = match &listener {
            Listener::Unix(socket) => socket.accept().await.map(Stream::Unix),
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
    let (fd, pid, dialect) = match stream {
        Stream::Unix(mut stream) => {
            let pid = stream.peer_cred()?.pid();
            let Some(dialect) = passes(&mut stream, mirror).await? else {
                return Ok(());
            };
            let stream = stream.into_std()?;
            stream.set_nonblocking(false)?;
            (OwnedFd::from(stream), pid, dialect)
        }
        Stream::Tcp(mut stream) => {
            stream.set_nodelay(true)?;
            let Some(dialect) = passes(&mut stream, mirror).await? else {
                return Ok(());
            };
            let stream = stream.into_std()?;
            stream.set_nonblocking(false)?;
            setsockopt(&stream, sockopt::KeepAlive, &true)?;
            (OwnedFd::from(stream), None, dialect)
        }
    };
    mirror.post(Letter::Guest { fd, pid, dialect });
    Ok(())
}

async fn passes<S>(stream: &mut S, mirror: &Mirror) -> io::Result<Option<Dialect>>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    Ok(match negotiate(stream, mirror).await? {
        Outcome::Transmission(dialect) => Some(dialect),
        Outcome::Over => None,
    })
}
