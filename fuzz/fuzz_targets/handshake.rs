//! See `kagami_fuzz::handshake`.
#![no_main]
kagami_fuzz::target!(handshake);
