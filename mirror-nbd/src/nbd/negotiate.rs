//! The handshake of NBD's fixed newstyle, up to the transmission phase or the end.
//!
//! Everything a client can make us read is bounded, in bytes and in options; time is the
//! caller's to bound.

use std::io;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

const MAGIC: u64 = 0x4e42_444d_4147_4943;
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;

const FIXED_NEWSTYLE: u16 = 1;
const NO_ZEROES: u16 = 2;

const OPT_EXPORT_NAME: u32 = 1;
const OPT_ABORT: u32 = 2;
const OPT_LIST: u32 = 3;
const OPT_INFO: u32 = 6;
const OPT_GO: u32 = 7;

const REP_ACK: u32 = 1;
const REP_SERVER: u32 = 2;
const REP_INFO: u32 = 3;
const REP_ERR_UNSUP: u32 = 0x8000_0001;
const REP_ERR_POLICY: u32 = 0x8000_0002;
const REP_ERR_INVALID: u32 = 0x8000_0003;
const REP_ERR_UNKNOWN: u32 = 0x8000_0006;
const REP_ERR_TOO_BIG: u32 = 0x8000_0009;

const INFO_EXPORT: u16 = 0;
const INFO_NAME: u16 = 1;
const INFO_BLOCK_SIZE: u16 = 3;

/// HAS_FLAGS, SEND_FLUSH, SEND_FUA, SEND_TRIM, SEND_WRITE_ZEROES, CAN_MULTI_CONN.
const TRANSMISSION_FLAGS: u16 = 1 | 4 | 8 | 32 | 64 | 256;

/// The most data an option is read for; names have at most 4096 bytes.
const MAX_OPTION: u32 = 8 << 10;

/// The most data an option is passed over for, before the client is given up.
const MAX_IGNORED: u32 = 64 << 10;

/// The most options of one client.
const MAX_OPTIONS: usize = 64;

const MIN_BLOCK: u32 = mirror_core::limits::SECTOR as u32;
const PREFERRED_BLOCK: u32 = mirror_core::limits::BLOCK as u32;
const MAX_BLOCK: u32 = mirror_core::limits::MAX_PAYLOAD;

/// What is exported, as negotiation sees it.
pub trait Export {
    /// The mirror's name; the empty name means it too.
    fn name(&self) -> &str;
    /// Its size while it is served here.
    fn size(&self) -> Option<u64>;
    /// Why it is not served, for the client's user.
    fn why_not(&self) -> String;
}

/// How a negotiation ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// Requests may follow.
    Transmission,
    /// The connection is to be closed.
    Over,
}

/// Negotiates. Reads not a byte of what follows.
///
/// # Errors
///
/// The connection broke, or the client made no sense ([`io::ErrorKind::InvalidData`]).
pub async fn negotiate<S>(stream: &mut S, export: &impl Export) -> io::Result<Outcome>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut greeting = Vec::with_capacity(18);
    greeting.extend_from_slice(&MAGIC.to_be_bytes());
    greeting.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
    greeting.extend_from_slice(&(FIXED_NEWSTYLE | NO_ZEROES).to_be_bytes());
    stream.write_all(&greeting).await?;

    let flags = stream.read_u32().await?;
    if flags & !u32::from(FIXED_NEWSTYLE | NO_ZEROES) != 0 {
        return Err(nonsense("unknown client flags"));
    }
    let no_zeroes = flags & u32::from(NO_ZEROES) != 0;

    for _ in 0..MAX_OPTIONS {
        if stream.read_u64().await? != OPTION_MAGIC {
            return Err(nonsense("bad option magic"));
        }
        let option = stream.read_u32().await?;
        let length = stream.read_u32().await?;
        if length > MAX_OPTION {
            pass_over(stream, length).await?;
            if option == OPT_EXPORT_NAME {
                return Ok(Outcome::Over);
            }
            reply(stream, option, REP_ERR_TOO_BIG, b"option too long").await?;
            continue;
        }
        let mut data = vec![0; length as usize];
        stream.read_exact(&mut data).await?;
        match option {
            OPT_EXPORT_NAME => return export_name(stream, &data, no_zeroes, export).await,
            OPT_ABORT => {
                // The client may be gone without waiting for it.
                let _ = reply(stream, option, REP_ACK, &[]).await;
                return Ok(Outcome::Over);
            }
            OPT_LIST => list(stream, &data, export).await?,
            OPT_INFO | OPT_GO => {
                if info(stream, option, &data, export).await? && option == OPT_GO {
                    return Ok(Outcome::Transmission);
                }
            }
            _ => reply(stream, option, REP_ERR_UNSUP, b"option not supported").await?,
        }
    }
    Err(nonsense("too many options"))
}

async fn export_name<S>(
    stream: &mut S,
    name: &[u8],
    no_zeroes: bool,
    export: &impl Export,
) -> io::Result<Outcome>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    // This option has no way to answer with an error.
    let (true, Some(size)) = (names(name, export), export.size()) else {
        return Ok(Outcome::Over);
    };
    let mut answer = Vec::with_capacity(134);
    answer.extend_from_slice(&size.to_be_bytes());
    answer.extend_from_slice(&TRANSMISSION_FLAGS.to_be_bytes());
    if !no_zeroes {
        answer.resize(134, 0);
    }
    stream.write_all(&answer).await?;
    Ok(Outcome::Transmission)
}

async fn list<S>(stream: &mut S, data: &[u8], export: &impl Export) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    if !data.is_empty() {
        return reply(stream, OPT_LIST, REP_ERR_INVALID, b"no data belongs here").await;
    }
    let name = export.name().as_bytes();
    let mut server = Vec::with_capacity(4 + name.len());
    server.extend_from_slice(&(name.len() as u32).to_be_bytes());
    server.extend_from_slice(name);
    reply(stream, OPT_LIST, REP_SERVER, &server).await?;
    reply(stream, OPT_LIST, REP_ACK, &[]).await
}

/// Answers `INFO` or `GO`; whether it was granted.
async fn info<S>(stream: &mut S, option: u32, data: &[u8], export: &impl Export) -> io::Result<bool>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let Some((name, wanted)) = parse_info(data) else {
        reply(stream, option, REP_ERR_INVALID, b"malformed option").await?;
        return Ok(false);
    };
    if !names(name, export) {
        reply(stream, option, REP_ERR_UNKNOWN, b"no such export").await?;
        return Ok(false);
    }
    let Some(size) = export.size() else {
        reply(stream, option, REP_ERR_POLICY, export.why_not().as_bytes()).await?;
        return Ok(false);
    };

    let mut facts = Vec::with_capacity(12);
    facts.extend_from_slice(&INFO_EXPORT.to_be_bytes());
    facts.extend_from_slice(&size.to_be_bytes());
    facts.extend_from_slice(&TRANSMISSION_FLAGS.to_be_bytes());
    reply(stream, option, REP_INFO, &facts).await?;

    if wanted.contains(&INFO_NAME) {
        let mut facts = INFO_NAME.to_be_bytes().to_vec();
        facts.extend_from_slice(export.name().as_bytes());
        reply(stream, option, REP_INFO, &facts).await?;
    }
    // Also unasked: a client that looks at it learns what a request must be aligned to.
    let mut facts = INFO_BLOCK_SIZE.to_be_bytes().to_vec();
    for size in [MIN_BLOCK, PREFERRED_BLOCK, MAX_BLOCK] {
        facts.extend_from_slice(&size.to_be_bytes());
    }
    reply(stream, option, REP_INFO, &facts).await?;
    reply(stream, option, REP_ACK, &[]).await?;
    Ok(true)
}

/// The name and the wanted information types of an `INFO` or `GO`.
fn parse_info(data: &[u8]) -> Option<(&[u8], Vec<u16>)> {
    let (length, rest) = data.split_first_chunk::<4>()?;
    let (name, rest) = rest.split_at_checked(u32::from_be_bytes(*length) as usize)?;
    let (count, rest) = rest.split_first_chunk::<2>()?;
    let count = usize::from(u16::from_be_bytes(*count));
    if rest.len() != count * 2 {
        return None;
    }
    let wanted = rest.chunks_exact(2);
    let wanted = wanted.map(|pair| u16::from_be_bytes([pair[0], pair[1]]));
    Some((name, wanted.collect()))
}

fn names(name: &[u8], export: &impl Export) -> bool {
    name.is_empty() || name == export.name().as_bytes()
}

async fn reply<S>(stream: &mut S, option: u32, kind: u32, data: &[u8]) -> io::Result<()>
where
    S: AsyncWrite + Unpin,
{
    let mut bytes = Vec::with_capacity(20 + data.len());
    bytes.extend_from_slice(&REPLY_MAGIC.to_be_bytes());
    bytes.extend_from_slice(&option.to_be_bytes());
    bytes.extend_from_slice(&kind.to_be_bytes());
    bytes.extend_from_slice(&(data.len() as u32).to_be_bytes());
    bytes.extend_from_slice(data);
    stream.write_all(&bytes).await
}

async fn pass_over<S>(stream: &mut S, length: u32) -> io::Result<()>
where
    S: AsyncRead + Unpin,
{
    if length > MAX_IGNORED {
        return Err(nonsense("option of absurd length"));
    }
    let mut rest = stream.take(u64::from(length));
    let passed = tokio::io::copy(&mut rest, &mut tokio::io::sink()).await?;
    if passed < u64::from(length) {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(())
}

fn nonsense(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests;
