//! base
pub mod fetch;
