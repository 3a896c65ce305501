//! A small blocking NBD client with requests in flight, written from the protocol's document.
//!
//! Simple replies only; fixed newstyle negotiation with `NBD_OPT_GO`.

use std::io::{self, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

const MAGIC: u64 = 0x4e42_444d_4147_4943;
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;
const OPT_GO: u32 = 7;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
const INFO_EXPORT: u16 = 0;
const FLAG_FUA: u16 = 1;

/// No answer for this long is an error: longer than any stall a mirror may cause.
const SILENCE: Duration = Duration::from_secs(30);

/// Where an NBD server listens.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum NbdAddress {
    /// On a Unix socket.
    Unix(PathBuf),
    /// On TCP.
    Tcp(SocketAddr),
}

impl NbdAddress {
    /// The address as the configuration writes it.
    pub fn config(&self) -> String {
        match self {
            NbdAddress::Unix(path) => format!("unix:{}", path.display()),
            NbdAddress::Tcp(address) => format!("tcp:{address}"),
        }
    }

    /// The address as NBD clients write it, for an export name (`""` for the default).
    pub fn uri(&self, export: &str) -> String {
        match self {
            NbdAddress::Unix(path) => format!("nbd+unix:///{export}?socket={}", path.display()),
            NbdAddress::Tcp(address) => format!("nbd://{address}/{export}"),
        }
    }
}

/// What a request asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NbdCommand {
    /// Read so many bytes.
    Read(u32),
    /// Write the data that goes with the request.
    Write {
        /// Complete only when durable.
        fua: bool,
    },
    /// Make what was completed durable.
    Flush,
    /// Give the range back.
    Trim(u32),
    /// Make the range zero.
    WriteZeroes(u32),
}

/// A server's reply to one request.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Reply {
    /// The request's number.
    pub cookie: u64,
    /// 0, or the server's error number.
    pub error: u32,
    /// What was read.
    pub data: Vec<u8>,
}

/// Why a request did not succeed.
#[derive(Debug)]
pub enum NbdError {
    /// The connection broke, or never stood: what became of requests is unknown.
    Lost(io::Error),
    /// The server refused the request with this error number.
    Refused(u32),
}

impl From<io::Error> for NbdError {
    fn from(error: io::Error) -> NbdError {
        NbdError::Lost(error)
    }
}

trait Stream: Read + Write + Send {
    fn duplicate(&self) -> io::Result<Box<dyn Stream>>;
}

impl Stream for UnixStream {
    fn duplicate(&self) -> io::Result<Box<dyn Stream>> {
        Ok(Box::new(self.try_clone()?))
    }
}

impl Stream for TcpStream {
    fn duplicate(&self) -> io::Result<Box<dyn Stream>> {
        Ok(Box::new(self.try_clone()?))
    }
}

/// A connection to an export.
pub struct NbdClient {
    writer: Box<dyn Stream>,
    reader: BufReader<Box<dyn Stream>>,
    size: u64,
    flags: u16,
    next_cookie: u64,
    /// Lengths of reads in flight, by cookie.
    reads: Vec<(u64, u32)>,
}

impl NbdClient {
    /// Connects and negotiates an export.
    ///
    /// # Errors
    ///
    /// When the server is not there or does not serve the export.
    pub fn connect(address: &NbdAddress, export: &str) -> io::Result<NbdClient> {
        let stream: Box<dyn Stream> = match address {
            NbdAddress::Unix(path) => {
                let stream = UnixStream::connect(path)?;
                stream.set_read_timeout(Some(SILENCE))?;
                stream.set_write_timeout(Some(SILENCE))?;
                Box::new(stream)
            }
            NbdAddress::Tcp(address) => {
                let stream = TcpStream::connect(address)?;
                stream.set_nodelay(true)?;
                stream.set_read_timeout(Some(SILENCE))?;
                stream.set_write_timeout(Some(SILENCE))?;
                Box::new(stream)
            }
        };
        let mut client = NbdClient {
            reader: BufReader::with_capacity(256 << 10, stream.duplicate()?),
            writer: stream,
            size: 0,
            flags: 0,
            next_cookie: 1,
            reads: Vec::new(),
        };
        client.negotiate(export)?;
        Ok(client)
    }

    fn negotiate(&mut self, export: &str) -> io::Result<()> {
        if self.u64()? != MAGIC || self.u64()? != OPTION_MAGIC {
            return Err(protocol("not an NBD server"));
        }
        let server = self.u16()?;
        if server & 1 == 0 {
            return Err(protocol("not a fixed newstyle server"));
        }
        // Fixed newstyle, and no zeroes if the server offers to leave them out.
        self.writer
            .write_all(&u32::from(server & 3).to_be_bytes())?;
        let mut option = Vec::new();
        option.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
        option.extend_from_slice(&OPT_GO.to_be_bytes());
        option.extend_from_slice(&(export.len() as u32 + 6).to_be_bytes());
        option.extend_from_slice(&(export.len() as u32).to_be_bytes());
        option.extend_from_slice(export.as_bytes());
        option.extend_from_slice(&0u16.to_be_bytes());
        self.writer.write_all(&option)?;
        loop {
            if self.u64()? != OPTION_REPLY_MAGIC || self.u32()? != OPT_GO {
                return Err(protocol("not a reply to NBD_OPT_GO"));
            }
            let kind = self.u32()?;
            let len = self.u32()? as usize;
            if len > 64 << 10 {
                return Err(protocol("an oversized option reply"));
            }
            let mut body = vec![0; len];
            self.reader.read_exact(&mut body)?;
            match kind {
                REP_ACK => return Ok(()),
                REP_INFO if len == 12 && body[..2] == INFO_EXPORT.to_be_bytes() => {
                    self.size = u64::from_be_bytes(body[2..10].try_into().expect("8 bytes"));
                    self.flags = u16::from_be_bytes(body[10..12].try_into().expect("2 bytes"));
                }
                REP_INFO => {}
                error => return Err(protocol(&format!("NBD_OPT_GO refused: {error:#x}"))),
            }
        }
    }

    /// The export's size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The transmission flags the server announced.
    pub fn flags(&self) -> u16 {
        self.flags
    }

    /// Sends a request without waiting for its reply; returns its cookie. `data` is empty but for
    /// writes.
    ///
    /// # Errors
    ///
    /// When the connection is lost.
    pub fn send(&mut self, command: NbdCommand, offset: u64, data: &[u8]) -> io::Result<u64> {
        let (kind, flags, len) = match command {
            NbdCommand::Read(len) => (0u16, 0, len),
            NbdCommand::Write { fua } => (1, if fua { FLAG_FUA } else { 0 }, data.len() as u32),
            NbdCommand::Flush => (3, 0, 0),
            NbdCommand::Trim(len) => (4, 0, len),
            NbdCommand::WriteZeroes(len) => (6, 0, len),
        };
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        let mut bytes = Vec::with_capacity(28 + data.len());
        bytes.extend_from_slice(&REQUEST_MAGIC.to_be_bytes());
        bytes.extend_from_slice(&flags.to_be_bytes());
        bytes.extend_from_slice(&kind.to_be_bytes());
        bytes.extend_from_slice(&cookie.to_be_bytes());
        bytes.extend_from_slice(&offset.to_be_bytes());
        bytes.extend_from_slice(&len.to_be_bytes());
        bytes.extend_from_slice(data);
        self.writer.write_all(&bytes)?;
        if let NbdCommand::Read(len) = command {
            self.reads.push((cookie, len));
        }
        Ok(cookie)
    }

    /// Waits for the next reply to any request.
    ///
    /// # Errors
    ///
    /// When the connection is lost or the server makes no sense.
    pub fn receive(&mut self) -> io::Result<Reply> {
        if self.u32()? != REPLY_MAGIC {
            return Err(protocol("not a simple reply"));
        }
        let error = self.u32()?;
        let cookie = self.u64()?;
        let mut data = Vec::new();
        if let Some(at) = self.reads.iter().position(|read| read.0 == cookie) {
            let (_, len) = self.reads.swap_remove(at);
            if error == 0 {
                data.resize(len as usize, 0);
                self.reader.read_exact(&mut data)?;
            }
        }
        Ok(Reply {
            cookie,
            error,
            data,
        })
    }

    fn call(&mut self, command: NbdCommand, offset: u64, data: &[u8]) -> Result<Vec<u8>, NbdError> {
        let cookie = self.send(command, offset, data)?;
        let reply = self.receive()?;
        if reply.cookie != cookie {
            return Err(NbdError::Lost(protocol("a reply to another request")));
        }
        match reply.error {
            0 => Ok(reply.data),
            error => Err(NbdError::Refused(error)),
        }
    }

    /// Reads a range.
    ///
    /// # Errors
    ///
    /// When the connection is lost or the server refuses.
    pub fn read(&mut self, offset: u64, len: u32) -> Result<Vec<u8>, NbdError> {
        self.call(NbdCommand::Read(len), offset, &[])
    }

    /// Writes a range.
    ///
    /// # Errors
    ///
    /// When the connection is lost or the server refuses.
    pub fn write(&mut self, offset: u64, data: &[u8], fua: bool) -> Result<(), NbdError> {
        self.call(NbdCommand::Write { fua }, offset, data).map(drop)
    }

    /// Makes everything written so far durable.
    ///
    /// # Errors
    ///
    /// When the connection is lost or the server refuses.
    pub fn flush(&mut self) -> Result<(), NbdError> {
        self.call(NbdCommand::Flush, 0, &[]).map(drop)
    }

    /// Zeroes a range.
    ///
    /// # Errors
    ///
    /// When the connection is lost or the server refuses.
    pub fn write_zeroes(&mut self, offset: u64, len: u32) -> Result<(), NbdError> {
        self.call(NbdCommand::WriteZeroes(len), offset, &[])
            .map(drop)
    }

    /// Trims a range.
    ///
    /// # Errors
    ///
    /// When the connection is lost or the server refuses.
    pub fn trim(&mut self, offset: u64, len: u32) -> Result<(), NbdError> {
        self.call(NbdCommand::Trim(len), offset, &[]).map(drop)
    }

    fn u16(&mut self) -> io::Result<u16> {
        let mut bytes = [0; 2];
        self.reader.read_exact(&mut bytes)?;
        Ok(u16::from_be_bytes(bytes))
    }

    fn u32(&mut self) -> io::Result<u32> {
        let mut bytes = [0; 4];
        self.reader.read_exact(&mut bytes)?;
        Ok(u32::from_be_bytes(bytes))
    }

    fn u64(&mut self) -> io::Result<u64> {
        let mut bytes = [0; 8];
        self.reader.read_exact(&mut bytes)?;
        Ok(u64::from_be_bytes(bytes))
    }
}

fn protocol(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}
