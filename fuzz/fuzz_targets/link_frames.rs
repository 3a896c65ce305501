//! See `kagami_fuzz::link_frames`.
#![no_main]
kagami_fuzz::target!(link_frames);
