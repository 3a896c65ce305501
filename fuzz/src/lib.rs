//! What the fuzz targets do with an input, one module each (docs/fuzzing.md).
//!
//! A module has `run`, which feeds an input to a decoder and checks what must hold of the result,
//! and `seeds`, real encodings to begin with. A checksum would keep every mutated input out, so
//! `run` tries an input as it is and once more with its checksums repaired.

pub mod activity_log;
pub mod bitmap;
mod bytes;
pub mod config;
pub mod control;
pub mod handshake;
mod host;
pub mod link_frames;
pub mod nbd_options;
pub mod nbd_requests;
pub mod superblock;

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

#[cfg(feature = "libfuzzer")]
#[doc(hidden)]
pub use libfuzzer_sys::fuzz_target;

/// What a target does with an input: panics on a finding, else tells whether a decoder took it.
pub type Run = fn(&[u8]) -> bool;

/// Makes a module of this crate the target of a program.
#[cfg(feature = "libfuzzer")]
#[macro_export]
macro_rules! target {
    ($name:ident) => {
        $crate::fuzz_target!(
            init: $crate::begin(&$crate::$name::seeds(), $crate::$name::run),
            |data: &[u8]| $crate::feed($crate::$name::run, data)
        );
    };
}

/// Checks that the decoders take every seed: a target that is shut out by a checksum finds nothing
/// and says so nowhere. Writes them to the directory that `KAGAMI_FUZZ_SEEDS` names, if it does.
pub fn begin(seeds: &[Vec<u8>], run: Run) {
    for (at, seed) in seeds.iter().enumerate() {
        assert!(run(seed), "seed {at} is not understood");
    }
    let Some(directory) = std::env::var_os("KAGAMI_FUZZ_SEEDS") else {
        return;
    };
    for (at, seed) in seeds.iter().enumerate() {
        let path = Path::new(&directory).join(format!("seed-{at}"));
        std::fs::write(&path, seed).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }
}

static RUNS: AtomicU64 = AtomicU64::new(0);
static TAKEN: AtomicU64 = AtomicU64::new(0);

/// Runs one input, and now and then says how many were taken.
pub fn feed(run: Run, data: &[u8]) {
    TAKEN.fetch_add(run(data).into(), Ordering::Relaxed);
    let runs = RUNS.fetch_add(1, Ordering::Relaxed) + 1;
    if runs.is_power_of_two() {
        let taken = TAKEN.load(Ordering::Relaxed);
        eprintln!("understood: {} percent of {runs}", 100 * taken / runs);
    }
}

/// Puts the CRC-32 of a metadata block at `crc_at`, where the block has it; that field counts as
/// zero (docs/format.md).
fn repair_block(block: &mut [u8], crc_at: usize) {
    block[crc_at..crc_at + 4].fill(0);
    let crc = crc32fast::hash(block);
    block[crc_at..crc_at + 4].copy_from_slice(&crc.to_le_bytes());
}

/// Text for logs and terminals: of one line and without control characters.
fn assert_harmless(text: &str) {
    assert!(!text.chars().any(char::is_control), "{text:?}");
}
