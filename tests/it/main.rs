//! End-to-end tests: prefold as its users meet it, against oracles from other implementations.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr)]

mod graphs;
mod oracles;
mod support;
