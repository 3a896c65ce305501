//! What negotiation leaves behind besides the export: how a client is answered, and what it may
//! ask.

/// HAS_FLAGS, SEND_FLUSH, SEND_FUA, SEND_TRIM, SEND_WRITE_ZEROES, CAN_MULTI_CONN, SEND_CACHE.
const FLAGS: u16 = 1 | 4 | 8 | 32 | 64 | 256 | 1024;

/// SEND_DF: only to clients that agreed on structured replies.
const FLAG_SEND_DF: u16 = 128;

/// What a client and the server agreed on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Dialect {
    /// Simple replies only, as every client understands them.
    Simple,
    /// Structured replies.
    Structured(Contexts),
}

/// The metadata contexts that a client selected for its export.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Contexts {
    /// None.
    None,
    /// `base:allocation`, the only one there is.
    Allocation,
}

impl Dialect {
    /// Whether block status may be asked for.
    pub fn tells_allocation(self) -> bool {
        self == Dialect::Structured(Contexts::Allocation)
    }

    /// The transmission flags of the export for this client.
    pub fn flags(self) -> u16 {
        match self {
            Dialect::Simple => FLAGS,
            Dialect::Structured(_) => FLAGS | FLAG_SEND_DF,
        }
    }
}
