//! A small blocking NBD client: fixed newstyle, `NBD_OPT_GO`, simple replies, several requests in
//! flight. What `kagami demo --script` reads and writes with.

use std::collections::HashMap;
use std::io::{self, BufReader, Error, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

const INIT_MAGIC: u64 = u64::from_be_bytes(*b"NBDMAGIC");
const OPTION_MAGIC: u64 = u64::from_be_bytes(*b"IHAVEOPT");
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;

const HANDSHAKE_FIXED_NEWSTYLE: u16 = 1;
const HANDSHAKE_NO_ZEROES: u16 = 2;
const OPTION_GO: u32 = 7;
const REPLY_ACK: u32 = 1;
const REPLY_INFO: u32 = 3;
const REPLY_ERROR_BIT: u32 = 1 << 31;
const INFO_EXPORT: u16 = 0;

const FLAG_FUA: u16 = 1;

/// An option reply longer than this is not believed.
const MAX_OPTION_REPLY: u32 = 64 << 10;

/// What a request does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u16)]
enum Kind {
    Read = 0,
    Write = 1,
    Disconnect = 2,
    Flush = 3,
}

/// Names a request in flight.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct Cookie(u64);

/// The answer to one request.
#[derive(Debug)]
pub struct Reply {
    /// Which request.
    pub cookie: Cookie,
    /// The data of a read, empty for others; or the server's error number.
    pub result: Result<Vec<u8>, u32>,
}

/// A connection to one export.
#[derive(Debug)]
pub struct NbdClient<S: Read + Write = UnixStream> {
    stream: BufReader<S>,
    /// Bytes of the export.
    pub size: u64,
    next: u64,
    /// Bytes that the reply to each request in flight carries.
    in_flight: HashMap<Cookie, usize>,
}

impl NbdClient {
    /// Connects to a Unix socket. A server silent for longer than `timeout` is an error.
    pub fn connect(socket: &Path, export: &str, timeout: Duration) -> io::Result<NbdClient> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(timeout))?;
        stream.set_write_timeout(Some(timeout))?;
        NbdClient::negotiate(stream, export)
    }
}

impl<S: Read + Write> NbdClient<S> {
    /// Agrees with the server about an export.
    pub fn negotiate(stream: S, export: &str) -> io::Result<NbdClient<S>> {
        let mut stream = BufReader::with_capacity(256 << 10, stream);
        if read_u64(&mut stream)? != INIT_MAGIC || read_u64(&mut stream)? != OPTION_MAGIC {
            return Err(nonsense("no NBD server of the newstyle kind"));
        }
        let flags = read_u16(&mut stream)? & (HANDSHAKE_FIXED_NEWSTYLE | HANDSHAKE_NO_ZEROES);
        if flags & HANDSHAKE_FIXED_NEWSTYLE == 0 {
            return Err(nonsense("the server does not speak fixed newstyle"));
        }
        let mut option = Vec::new();
        option.extend_from_slice(&u32::from(flags).to_be_bytes());
        option.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
        option.extend_from_slice(&OPTION_GO.to_be_bytes());
        option.extend_from_slice(&(export.len() as u32 + 6).to_be_bytes());
        option.extend_from_slice(&(export.len() as u32).to_be_bytes());
        option.extend_from_slice(export.as_bytes());
        option.extend_from_slice(&0u16.to_be_bytes());
        stream.get_mut().write_all(&option)?;

        let mut size = None;
        loop {
            let (kind, data) = read_option_reply(&mut stream)?;
            match (kind, data.as_slice()) {
                (REPLY_ACK, _) => break,
                (REPLY_INFO, [kind @ .., _, _, _, _, _, _, _, _, _, _])
                    if kind == INFO_EXPORT.to_be_bytes() =>
                {
                    size = data[2..10].try_into().ok().map(u64::from_be_bytes);
                }
                (kind, text) if kind & REPLY_ERROR_BIT != 0 => {
                    let text = String::from_utf8_lossy(text);
                    let what = format!("the server refuses the export: {kind:#x} {text}");
                    return Err(Error::new(ErrorKind::NotFound, what));
                }
                _ => {}
            }
        }
        let size = size.ok_or_else(|| nonsense("the server did not tell the export's size"))?;
        Ok(NbdClient {
            stream,
            size,
            next: 1,
            in_flight: HashMap::new(),
        })
    }

    /// Sends a read.
    pub fn submit_read(&mut self, offset: u64, len: u32) -> io::Result<Cookie> {
        self.submit(Kind::Read, 0, offset, len, &[])
    }

    /// Sends a write; with `fua` it is answered only when durable.
    pub fn submit_write(&mut self, offset: u64, data: &[u8], fua: bool) -> io::Result<Cookie> {
        let flags = if fua { FLAG_FUA } else { 0 };
        self.submit(Kind::Write, flags, offset, data.len() as u32, data)
    }

    /// Makes all answered writes durable.
    pub fn flush(&mut self) -> io::Result<()> {
        let cookie = self.submit(Kind::Flush, 0, 0, 0, &[])?;
        loop {
            let reply = self.next_reply()?;
            if reply.cookie == cookie {
                let failed = |number| Error::from_raw_os_error(number as i32);
                return reply.result.map(drop).map_err(failed);
            }
        }
    }

    /// Requests not answered yet.
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Waits for the answer to any request.
    pub fn next_reply(&mut self) -> io::Result<Reply> {
        if read_u32(&mut self.stream)? != REPLY_MAGIC {
            return Err(nonsense("a reply without its magic number"));
        }
        let error = read_u32(&mut self.stream)?;
        let cookie = Cookie(read_u64(&mut self.stream)?);
        let len = self
            .in_flight
            .remove(&cookie)
            .ok_or_else(|| nonsense("a reply to a request that was not made"))?;
        if error != 0 {
            return Ok(Reply {
                cookie,
                result: Err(error),
            });
        }
        let mut data = vec![0; len];
        self.stream.read_exact(&mut data)?;
        Ok(Reply {
            cookie,
            result: Ok(data),
        })
    }

    /// Says goodbye; the server has nothing to answer.
    pub fn disconnect(mut self) -> io::Result<()> {
        self.submit(Kind::Disconnect, 0, 0, 0, &[]).map(drop)
    }

    fn submit(
        &mut self,
        kind: Kind,
        flags: u16,
        offset: u64,
        len: u32,
        data: &[u8],
    ) -> io::Result<Cookie> {
        let cookie = Cookie(self.next);
        self.next += 1;
        let mut request = Vec::with_capacity(28 + data.len());
        request.extend_from_slice(&REQUEST_MAGIC.to_be_bytes());
        request.extend_from_slice(&flags.to_be_bytes());
        request.extend_from_slice(&(kind as u16).to_be_bytes());
        request.extend_from_slice(&cookie.0.to_be_bytes());
        request.extend_from_slice(&offset.to_be_bytes());
        request.extend_from_slice(&len.to_be_bytes());
        request.extend_from_slice(data);
        if kind != Kind::Disconnect {
            let answer = if kind == Kind::Read { len as usize } else { 0 };
            self.in_flight.insert(cookie, answer);
        }
        self.stream.get_mut().write_all(&request)?;
        Ok(cookie)
    }
}

fn read_option_reply(stream: &mut impl Read) -> io::Result<(u32, Vec<u8>)> {
    if read_u64(stream)? != OPTION_REPLY_MAGIC || read_u32(stream)? != OPTION_GO {
        return Err(nonsense("an option reply that answers nothing"));
    }
    let kind = read_u32(stream)?;
    let len = read_u32(stream)?;
    if len > MAX_OPTION_REPLY {
        return Err(nonsense("an option reply that is too long"));
    }
    let mut data = vec![0; len as usize];
    stream.read_exact(&mut data)?;
    Ok((kind, data))
}

fn nonsense(what: &str) -> Error {
    Error::new(ErrorKind::InvalidData, what.to_owned())
}

fn read_u16(stream: &mut impl Read) -> io::Result<u16> {
    let mut bytes = [0; 2];
    stream.read_exact(&mut bytes)?;
    Ok(u16::from_be_bytes(bytes))
}

fn read_u32(stream: &mut impl Read) -> io::Result<u32> {
    let mut bytes = [0; 4];
    stream.read_exact(&mut bytes)?;
    Ok(u32::from_be_bytes(bytes))
}

fn read_u64(stream: &mut impl Read) -> io::Result<u64> {
    let mut bytes = [0; 8];
    stream.read_exact(&mut bytes)?;
    Ok(u64::from_be_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Cursor;

    /// A server whose every byte is written beforehand.
    struct Canned {
        says: Cursor<Vec<u8>>,
        heard: Vec<u8>,
    }

    impl Read for Canned {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            self.says.read(buffer)
        }
    }

    impl Write for Canned {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.heard.extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn greeting(flags: u16) -> Vec<u8> {
        [b"NBDMAGICIHAVEOPT".as_slice(), &flags.to_be_bytes()].concat()
    }

    fn option_reply(kind: u32, data: &[u8]) -> Vec<u8> {
        let mut bytes = OPTION_REPLY_MAGIC.to_be_bytes().to_vec();
        bytes.extend_from_slice(&OPTION_GO.to_be_bytes());
        bytes.extend_from_slice(&kind.to_be_bytes());
        bytes.extend_from_slice(&(data.len() as u32).to_be_bytes());
        bytes.extend_from_slice(data);
        bytes
    }

    fn export(size: u64) -> Vec<u8> {
        [&INFO_EXPORT.to_be_bytes()[..], &size.to_be_bytes(), &[0, 1]].concat()
    }

    fn reply(error: u32, cookie: u64, data: &[u8]) -> Vec<u8> {
        let mut bytes = REPLY_MAGIC.to_be_bytes().to_vec();
        bytes.extend_from_slice(&error.to_be_bytes());
        bytes.extend_from_slice(&cookie.to_be_bytes());
        bytes.extend_from_slice(data);
        bytes
    }

    fn agreed(rest: &[Vec<u8>]) -> io::Result<NbdClient<Canned>> {
        let mut says = greeting(3);
        says.extend(option_reply(REPLY_INFO, &export(1 << 20)));
        says.extend(option_reply(REPLY_ACK, &[]));
        says.extend(rest.concat());
        NbdClient::negotiate(
            Canned {
                says: Cursor::new(says),
                heard: Vec::new(),
            },
            "r0",
        )
    }

    #[test]
    fn agrees_on_an_export() {
        let client = agreed(&[]).unwrap();
        assert_eq!(client.size, 1 << 20);
        let heard = &client.stream.get_ref().heard;
        assert_eq!(heard[..4], 3u32.to_be_bytes());
        assert_eq!(&heard[4..12], b"IHAVEOPT");
        assert_eq!(heard[12..16], 7u32.to_be_bytes());
        assert_eq!(heard[16..], [0, 0, 0, 8, 0, 0, 0, 2, b'r', b'0', 0, 0]);
    }

    #[test]
    fn replies_in_any_order() {
        let mut client = agreed(&[
            reply(0, 2, &[]),
            reply(0, 1, b"data"),
            reply(5, 3, &[]),
            reply(0, 4, &[]),
        ])
        .unwrap();
        let read = client.submit_read(0, 4).unwrap();
        let write = client.submit_write(4096, b"more", true).unwrap();
        let bad = client.submit_read(1 << 30, 4).unwrap();
        let first = client.next_reply().unwrap();
        assert_eq!((first.cookie, first.result), (write, Ok(vec![])));
        let second = client.next_reply().unwrap();
        assert_eq!((second.cookie, second.result), (read, Ok(b"data".to_vec())));
        let third = client.next_reply().unwrap();
        assert_eq!((third.cookie, third.result), (bad, Err(5)));
        client.flush().unwrap();
        assert_eq!(client.in_flight(), 0);
    }

    #[test]
    fn hostile_servers() {
        let mut refused = greeting(3);
        refused.extend(option_reply(REPLY_ERROR_BIT | 6, b"no such export"));
        let mut long = greeting(3);
        long.extend(option_reply(REPLY_INFO, &[]));
        let at = long.len() - 4;
        long[at..].copy_from_slice(&u32::MAX.to_be_bytes());
        let mut sizeless = greeting(3);
        sizeless.extend(option_reply(REPLY_ACK, &[]));
        for says in [
            Vec::new(),
            b"HTTP/1.1 400 Bad".to_vec(),
            greeting(0),
            refused,
            long,
            sizeless,
        ] {
            let server = Canned {
                says: Cursor::new(says),
                heard: Vec::new(),
            };
            assert!(NbdClient::negotiate(server, "").is_err());
        }
        let mut client = agreed(&[reply(0, 9, &[])]).unwrap();
        assert!(client.next_reply().is_err());
    }
}
