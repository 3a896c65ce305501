//! A TCP proxy on the mirror link that can slow, hold or cut it, without root and at any moment.

use socket2::{Domain, Socket, Type};
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

/// What the proxy does to the bytes that pass it, in both directions.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ProxyMode {
    /// Passes them on.
    Forward,
    /// Passes them on, each piece so much later.
    Delay(Duration),
    /// Passes on at most so many bytes a second in each direction.
    Throttle(u64),
    /// Passes them on, with one bit flipped in about so many bytes.
    Damage(u64),
    /// Keeps every byte, closes nothing: what both ends see of a network that drops everything.
    /// Bytes held go on when the mode changes, as TCP's retransmissions would.
    BlackHole,
    /// Closes every connection and every new one at once.
    Cut,
}

/// A running proxy; dropping it cuts its connections.
#[derive(Debug)]
pub struct Proxy {
    shared: Arc<Shared>,
    listen: SocketAddr,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    mode: ProxyMode,
    streams: Vec<TcpStream>,
    ended: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no thread of the proxy panics")
    }

    /// The mode, as soon as it lets bytes pass; `None` when connections are to be closed.
    fn wait_for_passage(&self) -> Option<ProxyMode> {
        let mut state = self.lock();
        loop {
            match state.mode {
                _ if state.ended => return None,
                ProxyMode::Cut => return None,
                ProxyMode::BlackHole => {
                    state = self
                        .changed
                        .wait(state)
                        .expect("no thread of the proxy panics");
                }
                mode => return Some(mode),
            }
        }
    }
}

impl Proxy {
    /// Listens on `listen` and passes connections on to `target`, as if they came from `source`.
    ///
    /// # Panics
    ///
    /// When the address is taken.
    #[track_caller]
    pub fn start(listen: SocketAddr, target: SocketAddr, source: std::net::IpAddr) -> Proxy {
        let listener = TcpListener::bind(listen)
            .unwrap_or_else(|error| panic!("the proxy cannot listen on {listen}: {error}"));
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                mode: ProxyMode::Forward,
                streams: Vec::new(),
                ended: false,
            }),
            changed: Condvar::new(),
        });
        let listen = listener
            .local_addr()
            .expect("a bound socket has an address");
        let accepting = Arc::clone(&shared);
        std::thread::spawn(move || {
            for near in listener.incoming().flatten() {
                if accepting.lock().ended {
                    return;
                }
                let accepting = Arc::clone(&accepting);
                // A connection that cannot be passed on is closed: the peer is not there.
                std::thread::spawn(move || drop(pass_on(&accepting, near, target, source)));
            }
        });
        Proxy { shared, listen }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.listen
    }

    /// Changes what it does, for standing connections too.
    pub fn set(&self, mode: ProxyMode) {
        let mut state = self.shared.lock();
        state.mode = mode;
        if mode == ProxyMode::Cut {
            close(&mut state);
        }
        self.shared.changed.notify_all();
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.ended = true;
        close(&mut state);
        self.shared.changed.notify_all();
        drop(state);
        // Wakes the accepting thread, so that it sees the end and frees the port.
        let _ = TcpStream::connect(self.listen);
    }
}

fn close(state: &mut State) {
    for stream in state.streams.drain(..) {
        // Fails only for a connection that is closed already.
        let _ = stream.shutdown(Shutdown::Both);
    }
}

fn pass_on(
    shared: &Arc<Shared>,
    near: TcpStream,
    target: SocketAddr,
    source: std::net::IpAddr,
) -> io::Result<()> {
    if shared.wait_for_passage().is_none() {
        return Ok(());
    }
    let socket = Socket::new(Domain::for_address(target), Type::STREAM, None)?;
    socket.bind(&SocketAddr::new(source, 0).into())?;
    socket.connect(&target.into())?;
    let far: TcpStream = socket.into();
    near.set_nodelay(true)?;
    far.set_nodelay(true)?;
    {
        let mut state = shared.lock();
        if state.ended || state.mode == ProxyMode::Cut {
            return Ok(());
        }
        state.streams.push(near.try_clone()?);
        state.streams.push(far.try_clone()?);
    }
    let (near_in, far_out) = (near.try_clone()?, far.try_clone()?);
    let back = Arc::clone(shared);
    std::thread::spawn(move || copy(&back, far, near));
    copy(shared, near_in, far_out);
    Ok(())
}

/// Copies one direction until either end closes or the proxy cuts; then closes both.
fn copy(shared: &Shared, mut from: TcpStream, mut to: TcpStream) {
    let mut buffer = vec![0; 64 << 10];
    while let Some(mode) = shared.wait_for_passage() {
        let limit = match mode {
            ProxyMode::Throttle(rate) => (rate / 100).clamp(1, buffer.len() as u64) as usize,
            _ => buffer.len(),
        };
        let Ok(count @ 1..) = from.read(&mut buffer[..limit]) else {
            break;
        };
        match shared.wait_for_passage() {
            None => break,
            Some(ProxyMode::Delay(delay)) => std::thread::sleep(delay),
            Some(ProxyMode::Throttle(rate)) => {
                std::thread::sleep(Duration::from_secs_f64(count as f64 / rate as f64));
            }
            Some(ProxyMode::Damage(every)) if fastrand::u64(..every) < count as u64 => {
                buffer[fastrand::usize(..count)] ^= 1 << fastrand::u32(..8);
            }
            Some(_) => {}
        }
        if to.write_all(&buffer[..count]).is_err() {
            break;
        }
    }
    // Either may be closed already.
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    const LOOPBACK: std::net::IpAddr = std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

    /// A proxied connection to a server: the client's end and the server's.
    fn pair() -> (Proxy, TcpStream, TcpStream) {
        let server = TcpListener::bind((LOOPBACK, 0)).unwrap();
        let target = server.local_addr().unwrap();
        let source = "127.0.0.2".parse().unwrap();
        let proxy = Proxy::start((LOOPBACK, 0).into(), target, source);
        let client = TcpStream::connect(proxy.address()).unwrap();
        let (accepted, from) = server.accept().unwrap();
        assert_eq!(from.ip(), source);
        accepted
            .set_read_timeout(Some(Duration::from_millis(200)))
            .unwrap();
        (proxy, client, accepted)
    }

    #[test]
    fn a_black_hole_holds_bytes_and_lets_them_go() {
        let (proxy, mut client, mut server) = pair();
        let mut byte = [0];
        client.write_all(b"a").unwrap();
        server.read_exact(&mut byte).unwrap();
        proxy.set(ProxyMode::BlackHole);
        client.write_all(b"b").unwrap();
        let error = server.read_exact(&mut byte).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        proxy.set(ProxyMode::Forward);
        server.read_exact(&mut byte).unwrap();
        assert_eq!(&byte, b"b");
    }

    #[test]
    fn damage_flips_single_bits() {
        let (proxy, mut client, mut server) = pair();
        proxy.set(ProxyMode::Damage(1));
        client.write_all(&[0; 4096]).unwrap();
        let mut bytes = [0; 4096];
        server.read_exact(&mut bytes).unwrap();
        assert!(bytes.iter().any(|byte| byte.count_ones() == 1));
    }

    #[test]
    fn a_cut_closes_standing_and_new_connections() {
        let (proxy, mut client, mut server) = pair();
        proxy.set(ProxyMode::Cut);
        let mut byte = [0];
        assert_eq!(server.read(&mut byte).unwrap(), 0);
        assert_eq!(client.read(&mut byte).unwrap_or(0), 0);
        let mut late = TcpStream::connect(proxy.address()).unwrap();
        assert_eq!(late.read(&mut byte).unwrap_or(0), 0);
    }

    #[test]
    fn delay_and_throttle_take_their_time() {
        let (proxy, mut client, mut server) = pair();
        server
            .set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        for (mode, bytes) in [
            (ProxyMode::Delay(Duration::from_millis(150)), 1),
            (ProxyMode::Throttle(1 << 20), 200 << 10),
        ] {
            proxy.set(mode);
            let start = Instant::now();
            client.write_all(&vec![7; bytes]).unwrap();
            server.read_exact(&mut vec![0; bytes]).unwrap();
            assert!(start.elapsed() >= Duration::from_millis(100), "{mode:?}");
        }
    }
}
