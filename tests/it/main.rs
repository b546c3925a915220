//! End-to-end tests: prefold as its users meet it, against oracles from other implementations.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr)]

mod checkpoints;
mod command_line;
mod data;
mod export;
mod gradients;
mod graphs;
mod methods;
mod oracles;
mod peft;
mod real_models;
mod run_control;
mod schemas;
mod support;
mod training;
mod verify;
