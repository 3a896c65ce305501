//! See `kagami_fuzz::superblock`.
#![no_main]
kagami_fuzz::target!(superblock);
