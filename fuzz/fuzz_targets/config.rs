//! See `kagami_fuzz::config`.
#![no_main]
kagami_fuzz::target!(config);
