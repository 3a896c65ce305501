//! The NBD server: how clients that know nothing of Kagami use a mirror as a disk.
//!
//! Fixed newstyle, with simple or structured replies and `base:allocation`; `docs/nbd.md` lists
//! what is offered. Negotiation ([`negotiate`]) is rare and runs on the main thread; after it the
//! socket goes to the mirror's own thread with what was agreed ([`dialect`]). There `server` keeps
//! the clients (`connection` is one of them), `intake` takes their requests in ([`transmit`] says what the bytes mean), `ledger`
//! knows those under way, and [`reply`] makes bytes of what came of them.

mod connection;
pub mod dialect;
mod intake;
mod ledger;
pub(crate) mod listen;
pub mod negotiate;
pub mod reply;
pub(crate) mod server;
pub mod transmit;
