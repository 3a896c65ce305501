//! The handshake of NBD's fixed newstyle, up to the transmission phase or the end.
//!
//! Everything a client can make us read is bounded, in bytes and in options; time is the
//! caller's to bound. What a client asks of metadata contexts is read in `meta_context`.

use crate::nbd::dialect::{Contexts, Dialect};
use crate::nbd::reply::ALLOCATION_ID;
use meta_context::Query;
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
const OPT_STRUCTURED_REPLY: u32 = 8;
const OPT_LIST_META_CONTEXT: u32 = 9;
const OPT_SET_META_CONTEXT: u32 = 10;

const REP_ACK: u32 = 1;
const REP_SERVER: u32 = 2;
const REP_INFO: u32 = 3;
const REP_META_CONTEXT: u32 = 4;
const REP_ERR_UNSUP: u32 = 0x8000_0001;
const REP_ERR_POLICY: u32 = 0x8000_0002;
const REP_ERR_INVALID: u32 = 0x8000_0003;
const REP_ERR_UNKNOWN: u32 = 0x8000_0006;
const REP_ERR_TOO_BIG: u32 = 0x8000_0009;

const INFO_EXPORT: u16 = 0;
const INFO_NAME: u16 = 1;
const INFO_BLOCK_SIZE: u16 = 3;

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
    Transmission(Dialect),
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
    let mut talk = Talk {
        stream,
        export,
        no_zeroes: flags & u32::from(NO_ZEROES) != 0,
        agreed: Agreed::Nothing,
    };
    for _ in 0..MAX_OPTIONS {
        if let Some(outcome) = talk.option().await? {
            return Ok(outcome);
        }
    }
    Err(nonsense("too many options"))
}

/// A client's options, one after another, and what came of them so far.
struct Talk<'a, S, E> {
    stream: &'a mut S,
    export: &'a E,
    no_zeroes: bool,
    agreed: Agreed,
}

enum Agreed {
    Nothing,
    /// On structured replies.
    Structured {
        /// The name of the export for which `base:allocation` was selected last. The default
        /// export's empty name and its full name are two names.
        allocation_of: Option<Vec<u8>>,
    },
}

impl Agreed {
    /// How a client speaks that enters transmission by this export's name.
    fn dialect(&self, name: &[u8]) -> Dialect {
        match self {
            Agreed::Nothing => Dialect::Simple,
            Agreed::Structured { allocation_of } if allocation_of.as_deref() == Some(name) => {
                Dialect::Structured(Contexts::Allocation)
            }
            Agreed::Structured { .. } => Dialect::Structured(Contexts::None),
        }
    }

    /// Agrees on structured replies, if it was not done before.
    fn structure(&mut self) {
        if let Agreed::Nothing = self {
            *self = Agreed::Structured {
                allocation_of: None,
            };
        }
    }

    fn select(&mut self, selected: Option<Vec<u8>>) {
        if let Agreed::Structured { allocation_of } = self {
            *allocation_of = selected;
        }
    }
}

impl<S, E> Talk<'_, S, E>
where
    S: AsyncRead + AsyncWrite + Unpin,
    E: Export,
{
    /// Reads and answers one option; how the negotiation ended, if it did.
    async fn option(&mut self) -> io::Result<Option<Outcome>> {
        if self.stream.read_u64().await? != OPTION_MAGIC {
            return Err(nonsense("bad option magic"));
        }
        let option = self.stream.read_u32().await?;
        let length = self.stream.read_u32().await?;
        if option == OPT_SET_META_CONTEXT {
            // What was selected before is so no more, even if this fails.
            self.agreed.select(None);
        }
        if length > MAX_OPTION {
            pass_over(self.stream, length).await?;
            if option == OPT_EXPORT_NAME {
                return Ok(Some(Outcome::Over));
            }
            self.reply(option, REP_ERR_TOO_BIG, b"option too long")
                .await?;
            return Ok(None);
        }
        let mut data = vec![0; length as usize];
        self.stream.read_exact(&mut data).await?;
        match option {
            OPT_EXPORT_NAME => return self.export_name(&data).await.map(Some),
            OPT_ABORT => {
                // The client may be gone without waiting for it.
                let _ = self.reply(option, REP_ACK, &[]).await;
                return Ok(Some(Outcome::Over));
            }
            OPT_LIST => self.list(&data).await?,
            OPT_INFO => drop(self.info(option, &data).await?),
            OPT_GO => {
                let granted = self.info(option, &data).await?;
                return Ok(granted.map(Outcome::Transmission));
            }
            OPT_STRUCTURED_REPLY => self.structured_reply(&data).await?,
            OPT_LIST_META_CONTEXT | OPT_SET_META_CONTEXT => {
                self.meta_context(option, &data).await?;
            }
            _ => {
                self.reply(option, REP_ERR_UNSUP, b"option not supported")
                    .await?;
            }
        }
        Ok(None)
    }

    async fn export_name(&mut self, name: &[u8]) -> io::Result<Outcome> {
        // This option has no way to answer with an error.
        let (true, Some(size)) = (names(name, self.export), self.export.size()) else {
            return Ok(Outcome::Over);
        };
        let dialect = self.agreed.dialect(name);
        let mut answer = Vec::with_capacity(134);
        answer.extend_from_slice(&size.to_be_bytes());
        answer.extend_from_slice(&dialect.flags().to_be_bytes());
        if !self.no_zeroes {
            answer.resize(134, 0);
        }
        self.stream.write_all(&answer).await?;
        Ok(Outcome::Transmission(dialect))
    }

    async fn list(&mut self, data: &[u8]) -> io::Result<()> {
        if !data.is_empty() {
            return self
                .reply(OPT_LIST, REP_ERR_INVALID, b"no data belongs here")
                .await;
        }
        let name = self.export.name().as_bytes();
        let mut server = Vec::with_capacity(4 + name.len());
        server.extend_from_slice(&(name.len() as u32).to_be_bytes());
        server.extend_from_slice(name);
        self.reply(OPT_LIST, REP_SERVER, &server).await?;
        self.reply(OPT_LIST, REP_ACK, &[]).await
    }

    /// Answers `INFO` or `GO`; how the client speaks from here on, if it was granted.
    async fn info(&mut self, option: u32, data: &[u8]) -> io::Result<Option<Dialect>> {
        let Some((name, wanted)) = parse_info(data) else {
            self.reply(option, REP_ERR_INVALID, b"malformed option")
                .await?;
            return Ok(None);
        };
        if !names(name, self.export) {
            self.reply(option, REP_ERR_UNKNOWN, b"no such export")
                .await?;
            return Ok(None);
        }
        let Some(size) = self.export.size() else {
            let why_not = self.export.why_not();
            self.reply(option, REP_ERR_POLICY, why_not.as_bytes())
                .await?;
            return Ok(None);
        };

        let dialect = self.agreed.dialect(name);
        let mut facts = Vec::with_capacity(12);
        facts.extend_from_slice(&INFO_EXPORT.to_be_bytes());
        facts.extend_from_slice(&size.to_be_bytes());
        facts.extend_from_slice(&dialect.flags().to_be_bytes());
        self.reply(option, REP_INFO, &facts).await?;

        if wanted.contains(&INFO_NAME) {
            let mut facts = INFO_NAME.to_be_bytes().to_vec();
            facts.extend_from_slice(self.export.name().as_bytes());
            self.reply(option, REP_INFO, &facts).await?;
        }
        // Also unasked: a client that looks at it learns what a request must be aligned to.
        let mut facts = INFO_BLOCK_SIZE.to_be_bytes().to_vec();
        for size in [MIN_BLOCK, PREFERRED_BLOCK, MAX_BLOCK] {
            facts.extend_from_slice(&size.to_be_bytes());
        }
        self.reply(option, REP_INFO, &facts).await?;
        self.reply(option, REP_ACK, &[]).await?;
        Ok(Some(dialect))
    }

    async fn structured_reply(&mut self, data: &[u8]) -> io::Result<()> {
        if !data.is_empty() {
            return self
                .reply(
                    OPT_STRUCTURED_REPLY,
                    REP_ERR_INVALID,
                    b"no data belongs here",
                )
                .await;
        }
        self.agreed.structure();
        self.reply(OPT_STRUCTURED_REPLY, REP_ACK, &[]).await
    }

    /// Answers `LIST_META_CONTEXT` or `SET_META_CONTEXT`.
    async fn meta_context(&mut self, option: u32, data: &[u8]) -> io::Result<()> {
        if let Agreed::Nothing = self.agreed {
            let text = b"structured replies have to be agreed on first";
            return self.reply(option, REP_ERR_INVALID, text).await;
        }
        let query = match Query::parse(data) {
            Ok(query) if names(query.export, self.export) => query,
            Ok(_) => {
                return self.reply(option, REP_ERR_UNKNOWN, b"no such export").await;
            }
            Err(meta_context::Flaw::Malformed) => {
                return self
                    .reply(option, REP_ERR_INVALID, b"malformed option")
                    .await;
            }
            Err(meta_context::Flaw::TooMany) => {
                return self
                    .reply(option, REP_ERR_TOO_BIG, b"too many queries")
                    .await;
            }
        };
        let (found, id) = if option == OPT_SET_META_CONTEXT {
            (query.selects_allocation(), ALLOCATION_ID)
        } else {
            // The protocol reserves the number in a list.
            (query.lists_allocation(), 0)
        };
        if found {
            let context = [&id.to_be_bytes(), meta_context::ALLOCATION].concat();
            self.reply(option, REP_META_CONTEXT, &context).await?;
        }
        if found && option == OPT_SET_META_CONTEXT {
            self.agreed.select(Some(query.export.to_vec()));
        }
        self.reply(option, REP_ACK, &[]).await
    }

    async fn reply(&mut self, option: u32, kind: u32, data: &[u8]) -> io::Result<()> {
        let mut bytes = Vec::with_capacity(20 + data.len());
        bytes.extend_from_slice(&REPLY_MAGIC.to_be_bytes());
        bytes.extend_from_slice(&option.to_be_bytes());
        bytes.extend_from_slice(&kind.to_be_bytes());
        bytes.extend_from_slice(&(data.len() as u32).to_be_bytes());
        bytes.extend_from_slice(data);
        self.stream.write_all(&bytes).await
    }
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

mod meta_context;
#[cfg(test)]
mod tests;
