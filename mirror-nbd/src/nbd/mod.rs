//! The NBD server: how clients that know nothing of Kagami use a mirror as a disk.
//!
//! Fixed newstyle with simple replies. Negotiation ([`negotiate`]) is rare and runs on the main
//! thread; after it the socket goes to the mirror's own thread, where `server` moves bytes with
//! the help of [`transmit`], which knows what they mean.

pub(crate) mod listen;
pub mod negotiate;
pub(crate) mod server;
pub mod transmit;
