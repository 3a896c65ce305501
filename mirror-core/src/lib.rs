//! Kagami's pure core: formats, decisions and the state machine of a mirror.
//!
//! Nothing here opens a socket or file, reads a clock, starts a thread or waits. A driver (the
//! daemon `kagami-mirror`, or the simulator) feeds [`node::Node::handle`] and carries out what it
//! asks for, so that the code that decides about data is the code that is simulated.
//!
//! R1 to R14 in the comments are the rules of ARCHITECTURE.md.

#![forbid(unsafe_code)]

pub mod config;
pub mod control;
pub mod error;
mod fields;
pub mod limits;
pub mod meta;
pub mod node;
#[cfg(feature = "sim")]
pub mod sim;
pub mod types;
pub mod wire;
