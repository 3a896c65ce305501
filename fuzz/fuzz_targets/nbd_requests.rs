//! See `kagami_fuzz::nbd_requests`.
#![no_main]
kagami_fuzz::target!(nbd_requests);
