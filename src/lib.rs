//! prefold trains an adapter for a frozen decoder language model, folds it into an ONNX graph of that model, and
//! proves that the graph computes the same function.
//!
//! ```text
//! checkpoint ──► DecoderSpec ──┬──► candle decoder ──► train ──► adapter ──┐
//! (HF folder or GGUF)          │                                           ▼
//!                              └──► ONNX graph  (or anyone's graph) ──► fold ──► graph + manifest
//!                                                                           │
//!                    candle decoder + adapter  ◄──────── verify ────────────┘──► parity report
//! ```
//!
//! # Rooms
//! Each room depends only on rooms above it in this list; [`cli`] is the only one that prints.
//!
//! | room | owns |
//! |---|---|
//! | [`files`] | mapped files, hashes, folders written whole or not at all, manifests |
//! | [`onnx`] | an ONNX file as a lossless editable graph |
//! | [`base`] | a frozen pretrained decoder: checkpoint, [`DecoderSpec`](base::DecoderSpec), candle forward, tokenizer |
//! | [`adapter`] | what is trained: one file per method, its file format |
//! | [`data`] | records → token batches |
//! | [`report`] | HTML pages and SVG charts |
//! | [`train`] | objectives, optimizer, schedule, checkpoints, the loop |
//! | [`export`] | [`DecoderSpec`](base::DecoderSpec) + weights → ONNX graph, per dialect |
//! | [`fold`] | adapter → into a graph: locate sites, emit |
//! | [`runtime`] | running a graph in ONNX Runtime and tract |
//! | [`parity`] | cases, error budget, comparison, report |
//! | [`cli`] | one file per command |
//!
//! The method is Prefix-Tuning+ (arXiv 2506.13674, Eq. 7): in every attention layer, for query head `h` and position `i`,
//! `o_i = softmax_attention(q_i, K, V) + elu(q_i)ᵀ · M_h`, with `M_h` of shape `[head_dim, head_dim]` trained from zero and
//! everything else frozen.

pub mod adapter;
pub mod base;
pub mod cli;
pub mod data;
pub mod export;
pub mod files;
pub mod fold;
pub mod onnx;
pub mod parity;
pub mod report;
pub mod runtime;
pub mod train;
