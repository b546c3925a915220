//! The `prefold` command.

fn main() {}
