//! Where a graph that failed departs.

use super::reference::{is_quantised, models};
use super::runtimes::with_others;
use super::*;
use crate::parity::{Localise, Truth, Way};

/// How a departure is looked for.
#[derive(Args, Clone, Debug, Default)]
pub(super) struct LocaliseArgs {
    /// Do not look for the layer and the node at which a graph that fails departs
    #[arg(long)]
    no_localise: bool,
    /// Where the nodes at fault are written, as a model with inputs and expected outputs that onnx's backend tests read
    /// [default: beside the report]
    #[arg(long, value_name = "FOLDER")]
    pub(super) reproducer: Option<PathBuf>,
}

/// A graph, and what it is judged by.
pub(super) struct Judged<'a> {
    pub(super) file: &'a Path,
    pub(super) graph: &'a Graph,
    pub(super) adapters: &'a [Adapted],
    pub(super) lineup: &'a Lineup,
}

/// Looks for the departures of the runs that failed. What keeps that from being done is a warning: the verdict stands.
pub(super) fn localise(
    context: &Context,
    check: &mut Check,
    checkpoint: &Checkpoint,
    judged: &Judged<'_>,
    chosen: &[Chosen],
    options: &VerifyArgs,
) {
    if options.localise.wanted(&[judged.graph]) && check.departs() {
        LocaliseArgs::warn(try_localise(context, check, checkpoint, judged, chosen, options));
    }
}

impl LocaliseArgs {
    /// Whether departures are looked for: in a quantised graph every tensor departs.
    pub(super) fn wanted(&self, graphs: &[&Graph]) -> bool {
        !self.no_localise && !graphs.iter().any(|graph| is_quantised(graph.graph()))
    }

    /// What keeps a departure from being found is a warning: the verdict stands.
    pub(super) fn warn(found: Result<()>) {
        if let Err(error) = found {
            tracing::warn!("where the graph departs was not found: {error}");
        }
    }
}

fn try_localise(
    context: &Context,
    check: &mut Check,
    checkpoint: &Checkpoint,
    judged: &Judged<'_>,
    chosen: &[Chosen],
    options: &VerifyArgs,
) -> Result<()> {
    let precision = precision_of(judged.graph);
    let hooks = judged.lineup.hooks(judged.adapters, checkpoint.spec(), &Device::Cpu)?;
    let load = |dtype| Decoder::load(checkpoint, dtype, &Device::Cpu);
    let reference = load(options.reference.dtype())?;
    let own = (precision != options.reference.dtype()).then(|| load(precision)).transpose()?;
    let truth = Truth::Model {
        spec: checkpoint.spec(),
        reference: &models(&reference, &hooks),
        own: &models(own.as_ref().unwrap_or(&reference), &hooks),
    };
    localise_by(context, judged, truth, chosen, options, |what| Ok(check.localise(what)?))
}

/// Where a graph departs from the other one that it was compared with.
pub(super) fn localise_against(
    context: &Context,
    check: &mut Check,
    judged: &Judged<'_>,
    (file, graph, lineup): (&Path, &Graph, &Lineup),
    chosen: &[Chosen],
    options: &VerifyArgs,
) {
    if options.localise.wanted(&[judged.graph, graph]) && check.departs_from_other() {
        let truth = Truth::Graph { file, graph, given: &lineup.given, way: None };
        let found = |what: &Localise<'_>| Ok(check.localise_against(what)?);
        LocaliseArgs::warn(localise_by(context, judged, truth, chosen, options, found));
    }
}

/// Looks for departures from what a graph should compute, in the chosen runtimes and with others to ask.
pub(super) fn localise_by(
    context: &Context,
    judged: &Judged<'_>,
    truth: Truth<'_>,
    chosen: &[Chosen],
    options: &VerifyArgs,
    find: impl FnOnce(&Localise<'_>) -> Result<()>,
) -> Result<()> {
    let all = with_others(context, chosen);
    let ways: Vec<Way<'_>> = all
        .iter()
        .map(|chosen| Way { name: chosen.name.clone(), open: Box::new(|file, fed| chosen.open_fed(file, fed)) })
        .collect();
    find(&Localise {
        file: judged.file,
        graph: judged.graph,
        given: &judged.lineup.given,
        truth,
        ways: &ways,
        reproducers: options.localise.reproducer.as_deref(),
    })
}
