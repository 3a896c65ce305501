//! The daemon that keeps mirrors, as a library: `main.rs` is its command line.
//!
//! The core ([`mirror_core`]) decides, this crate acts. Each mirror has a thread (`driver`) with
//! its own backend (`ring` or `plain`) for disk, link and NBD clients; the main thread runs what is rare: the
//! control socket, NBD negotiation and the making of connections.
//!
//! Nothing but the program, and `fuzz` for what reads NBD clients' bytes, depends on it.

mod backend;
mod backing;
mod buffers;
mod choice;
mod clock;
mod control_socket;
mod credentials;
pub mod daemon;
mod desk;
mod disk;
mod driver;
mod extents;
mod link;
mod mailbox;
mod mirror;
pub mod nbd;
mod peer;
mod plain;
mod ring;
mod slots;
mod stream;
mod unix_socket;
mod workers;
