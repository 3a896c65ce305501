//! See `kagami_fuzz::nbd_options`.
#![no_main]
kagami_fuzz::target!(nbd_options);
