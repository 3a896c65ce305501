//! See `kagami_fuzz::bitmap`.
#![no_main]
kagami_fuzz::target!(bitmap);
