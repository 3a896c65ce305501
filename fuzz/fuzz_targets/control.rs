//! See `kagami_fuzz::control`.
#![no_main]
kagami_fuzz::target!(control);
