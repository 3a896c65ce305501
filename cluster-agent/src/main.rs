//! The daemon that will decide which node is Primary. It has no work yet.

fn main() {}
