//! `prefold fetch`

use std::process::ExitCode;

use clap::Args;
use miette::Result;

use super::Context;
use crate::base::fetch;

/// Fetch a model into the cache
#[derive(Args, Debug)]
pub(super) struct Fetch {
    /// smollm2, or hf:OWNER/NAME[@REVISION]
    model: String,
}

impl Fetch {
    pub(super) fn run(self, context: &Context) -> Result<ExitCode> {
        println!("{}", fetch::fetch(&self.model, &context.cache)?.display());
        Ok(ExitCode::SUCCESS)
    }
}
