//! What a client asks of metadata contexts, of which a mirror has one: `base:allocation`.

/// The name of the context.
pub const ALLOCATION: &[u8] = b"base:allocation";

/// All contexts of the namespace; means something in a list only.
const WHOLE_NAMESPACE: &[u8] = b"base:";

/// The most queries of one option.
const MAX_QUERIES: u32 = 64;

/// The longest query, as the protocol bounds its strings.
const MAX_QUERY: u32 = 4096;

/// The data of `LIST_META_CONTEXT` or `SET_META_CONTEXT`.
#[derive(PartialEq, Eq, Debug)]
pub struct Query<'d> {
    /// The export it is about.
    pub export: &'d [u8],
    queries: Vec<&'d [u8]>,
}

/// Why there is no query in an option.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Flaw {
    /// Its lengths do not add up.
    Malformed,
    /// More queries than are looked at.
    TooMany,
}

impl<'d> Query<'d> {
    /// Reads an option's data.
    pub fn parse(data: &'d [u8]) -> Result<Query<'d>, Flaw> {
        let (export, rest) = string(data).ok_or(Flaw::Malformed)?;
        let (count, mut rest) = rest.split_first_chunk::<4>().ok_or(Flaw::Malformed)?;
        let count = u32::from_be_bytes(*count);
        if count > MAX_QUERIES {
            return Err(Flaw::TooMany);
        }
        let mut queries = Vec::with_capacity(count as usize);
        for _ in 0..count {
            let (query, after) = string(rest).ok_or(Flaw::Malformed)?;
            queries.push(query);
            rest = after;
        }
        if !rest.is_empty() {
            return Err(Flaw::Malformed);
        }
        Ok(Query { export, queries })
    }

    /// Whether a list shows `base:allocation`: everything is listed to who asks for nothing.
    pub fn lists_allocation(&self) -> bool {
        self.queries.is_empty()
            || self.queries.contains(&WHOLE_NAMESPACE)
            || self.selects_allocation()
    }

    /// Whether `base:allocation` is selected. Queries that name nothing known are passed over.
    pub fn selects_allocation(&self) -> bool {
        self.queries.contains(&ALLOCATION)
    }
}

/// A string behind its length, and what follows.
fn string(data: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = data.split_first_chunk::<4>()?;
    let length = u32::from_be_bytes(*length);
    if length > MAX_QUERY {
        return None;
    }
    rest.split_at_checked(length as usize)
}
