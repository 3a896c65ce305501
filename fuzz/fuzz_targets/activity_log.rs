//! See `kagami_fuzz::activity_log`.
#![no_main]
kagami_fuzz::target!(activity_log);
