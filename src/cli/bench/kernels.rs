//! `prefold bench kernels`

use std::process::ExitCode;

use clap::Args;
use miette::{IntoDiagnostic, Result};
use serde_json::json;

use super::super::device::DeviceArgs;
use super::super::style;
use crate::base::cuda::self_check;
use crate::base::describe;

/// Check a device's operations against the same ones in float64
///
/// On a GPU these are prefold's kernels, on the CPU its own operations. Values and gradients, in float32, bfloat16 and float16.
/// Exit code 1 where one is further off than its tolerance.
#[derive(Args, Debug)]
pub(super) struct BenchKernels {
    #[command(flatten)]
    device: DeviceArgs,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl BenchKernels {
    pub(super) fn run(self) -> Result<ExitCode> {
        let device = self.device.open()?;
        let rows = self_check(&device).into_diagnostic()?;
        let differ = rows.iter().filter(|row| !row.holds()).count();
        if self.json {
            println!("{:#}", json!({ "device": describe(&device), "differ": differ, "rows": rows }));
        } else {
            let mut table = style::table(&["operation", "type", "shape", "error", "allowed", "verdict"]);
            for row in &rows {
                let shape = row.shape.iter().map(ToString::to_string).collect::<Vec<_>>().join(" × ");
                let verdict = if row.holds() { "pass" } else { "FAIL" };
                let (error, allowed) = (format!("{:.1e}", row.max_error), format!("{:.1e}", row.tolerance));
                table.add_row([row.kernel.clone(), row.dtype.clone(), shape, error, allowed, verdict.into()]);
            }
            println!("{table}\n{}: {} of {} hold", describe(&device), rows.len() - differ, rows.len());
        }
        Ok(if differ == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}
