//! End-to-end tests: prefold as its users meet it, against oracles from other implementations.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr)]

mod bad_graphs;
mod bench;
mod checkpoints;
mod ci_examples;
mod command_line;
mod data;
mod emissions;
mod emitted;
mod export;
mod false_alarms;
mod foreign;
mod fused;
mod fuzzed;
mod gradients;
mod graphs;
mod hostile;
mod large_graph;
mod linear_maps;
mod merge;
mod methods;
mod mutants;
mod operators;
mod oracles;
mod parallel;
mod peft;

mod real_models;
mod run_control;
mod schemas;
mod site_proof;
mod stacked;
mod support;
mod training;
mod verify;
mod verify_adapters;
mod verify_beside;
mod verify_graphs;
mod verify_known;
