//! How connections to the peer's daemon come about: one side connects, the other accepts.
//!
//! Runs on the main thread, a task per mirror. A connection that stands is handed to the mirror's
//! thread, which alone decides whether it wants it.

use crate::link::Seek;
use crate::mailbox::Letter;
use crate::mirror::Mirror;
use mirror_core::limits::{CONNECT_BACKOFF_MAX, CONNECT_BACKOFF_MIN};
use mirror_core::wire::{FrameType, HEADER_LEN, Header};
use nix::sys::socket::{setsockopt, sockopt};
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// How long an accepted connection may take to show its first frame, a `Ping`.
const GREETING_TIMEOUT: Duration = Duration::from_secs(5);

/// Accepted connections that have not shown it yet, at most.
const STRANGERS: usize = 16;

/// A connection that lived this long ends the growth of the pauses.
const GOOD_LIFE: Duration = Duration::from_secs(2);

/// Connects to the peer whenever the mirror wants it.
pub async fn connect(mirror: Arc<Mirror>, peer: SocketAddr) {
    let mut seek = mirror.seek.subscribe();
    let mut pause = CONNECT_BACKOFF_MIN;
    let mut rest_until = Instant::now();
    loop {
        let Ok(wanted) = seek.wait_for(|seek| seek.wanted).await.map(|seek| *seek) else {
            return;
        };
        sleep(rest_until.saturating_duration_since(Instant::now())).await;
        if !seek.borrow().wanted {
            continue;
        }
        match open(peer).await {
            Ok(fd) => {
                let began = Instant::now();
                mirror.post(Letter::Peer { fd });
                let dropped = |now: &Seek| now.round != wanted.round || !now.wanted;
                // First it is taken over, or is not wanted any more; then it ends.
                if seek.wait_for(dropped).await.is_err()
                    || seek.wait_for(|now| !now.linked).await.is_err()
                {
                    return;
                }
                if began.elapsed() >= GOOD_LIFE {
                    pause = CONNECT_BACKOFF_MIN;
                }
            }
            Err(error) => log::debug!("{}: {peer}: {error}", mirror.config.name),
        }
        rest_until = Instant::now() + jittered(pause);
        pause = (pause * 3 / 2).min(CONNECT_BACKOFF_MAX);
    }
}

async fn open(peer: SocketAddr) -> io::Result<OwnedFd> {
    let stream = timeout(CONNECT_TIMEOUT, TcpStream::connect(peer))
        .await
        .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    hand_over(stream)
}

/// Accepts the peer's connections whenever the mirror wants them.
pub async fn accept(mirror: Arc<Mirror>, address: SocketAddr) {
    let listener = listen(&mirror.config.name, address).await;
    let strangers = Arc::new(Semaphore::new(STRANGERS));
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                log::warn!("{}: accepting the peer: {error}", mirror.config.name);
                sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let seek = *mirror.seek.borrow();
        if !seek.wanted && !seek.linked {
            continue;
        }
        let Ok(place) = Arc::clone(&strangers).try_acquire_owned() else {
            continue;
        };
        let mirror = Arc::clone(&mirror);
        tokio::spawn(async move {
            // A connection may replace one that works, so it must first look like the peer's.
            if let Ok(Ok(())) = timeout(GREETING_TIMEOUT, shows_greeting(&stream)).await
                && let Ok(fd) = hand_over(stream)
            {
                mirror.post(Letter::Peer { fd });
            }
            drop(place);
        });
    }
}

async fn listen(name: &str, address: SocketAddr) -> TcpListener {
    let mut told = false;
    loop {
        match bind(address) {
            Ok(listener) => return listener,
            Err(error) if !told => {
                log::error!("{name}: the peer cannot be heard on {address} yet: {error}");
                told = true;
            }
            Err(_) => {}
        }
        sleep(Duration::from_secs(1)).await;
    }
}

fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() {
        TcpSocket::new_v4()?
    } else {
        TcpSocket::new_v6()?
    };
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(64)
}

/// Looks at the first frame without taking it from the stream.
async fn shows_greeting(stream: &TcpStream) -> io::Result<()> {
    let mut head = [0; HEADER_LEN];
    loop {
        match stream.peek(&mut head).await? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            HEADER_LEN => break,
            // Rare: the rest is on its way, but what is here keeps the socket readable.
            _ => sleep(Duration::from_millis(2)).await,
        }
    }
    match Header::decode(&head) {
        Ok(header) if header.kind == FrameType::Ping => Ok(()),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// Makes a socket ready for a mirror's thread: its backend waits by itself, so it must block.
fn hand_over(stream: TcpStream) -> io::Result<OwnedFd> {
    stream.set_nodelay(true)?;
    let stream = stream.into_std()?;
    stream.set_nonblocking(false)?;
    setsockopt(&stream, sockopt::KeepAlive, &true)?;
    setsockopt(&stream, sockopt::TcpKeepIdle, &10)?;
    setsockopt(&stream, sockopt::TcpKeepInterval, &3)?;
    setsockopt(&stream, sockopt::TcpKeepCount, &3)?;
    Ok(stream.into())
}

/// Between half and all of a pause, so that two sides do not keep step.
fn jittered(pause: Duration) -> Duration {
    let mut byte = [0];
    // Without randomness the pause is just whole.
    let share = getrandom::fill(&mut byte).map_or(256, |()| 128 + u32::from(byte[0]) / 2);
    pause * share / 256
}
