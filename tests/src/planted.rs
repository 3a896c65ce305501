//! Planted bugs: mistakes that a programmer could make in the mirror's core, each a few lines of
//! text in place of others, and the hunt that must find every one of them.
//!
//! A simulator is worth the mistakes it notices. `tests/planted/*.toml` lists mistakes by the rule
//! they break; `scripts/planted-bugs` makes each of them in a copy of the tree, never in the tree
//! itself, and looks for it with the instruments that a real mistake would meet. One that survives
//! is a hole in the oracle or in the faults.
//!
//! [`table`] reads the list and applies it, [`instrument`] runs what may find a mistake, [`hunt`]
//! keeps the copy and the results, [`report`] writes them into docs/simulation.md.

pub mod hunt;
pub mod instrument;
pub mod report;
pub mod table;

pub use hunt::Hunt;
pub use table::{Bug, read_table};
