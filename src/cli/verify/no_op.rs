//! The zero-adapter check: from which base graph, and with what in the place of the adapter.

use super::*;
use crate::runtime::NamedGiven;

/// Compares the base graph bit for bit with the graph whose adapter is off, where it can be, and else with the base graph that an
/// adapter of zeros is folded into.
pub(super) fn no_op(
    subject: &Subject,
    graph: &Graph,
    lineup: &Lineup,
    chosen: &[Chosen],
    check: &mut Check,
) -> Result<()> {
    let Some(Adapted { adapter, .. }) = subject.adapters.first() else { return Ok(()) };
    let scratch = TemporaryFolder::new()
        .map_err(crate::files::Error::io("create a temporary folder in", std::env::temp_dir()))?;
    let base = match (&subject.base_graph, dialect_of(graph)) {
        (Some(base), _) => base.clone(),
        (None, Some(dialect)) => {
            let dialect =
                dialect.map_err(|e| usage(format!("the graph's metadata is damaged: {e}"), "fold it again"))?;
            let precision = if precision_of(graph) == DType::F16 { Precision::F16 } else { Precision::F32 };
            let folder = scratch.path().join("base");
            std::fs::create_dir(&folder).map_err(crate::files::Error::io("create folder", &folder))?;
            let right_padding_only = is_right_padding_only(graph);
            let options = ExportOptions { dialect, precision, right_padding_only, ..ExportOptions::default() };
            export(subject.checkpoint, &options, &folder)?
        }
        (None, None) if !Record::all(graph)?.is_empty() => {
            let folder = scratch.path().join("base");
            std::fs::create_dir(&folder).map_err(crate::files::Error::io("create folder", &folder))?;
            unfold_folder(&subject.graph, true, &folder)?;
            folder.join(MODEL_NAME)
        }
        (None, None) => {
            tracing::warn!("the zero-adapter check is left out: give --base-graph, the graph before the fold");
            return Ok(());
        }
    };
    let folds = Record::all(graph)?;
    let (folded, given) = if let [fold] = &folds[..]
        && fold.emission != Emission::Baked
    {
        (subject.graph.clone(), lineup.off())
    } else {
        let zeros = scratch.path().join("zeros");
        let folded = scratch.path().join("folded");
        for folder in [&zeros, &folded] {
            std::fs::create_dir(folder).map_err(crate::files::Error::io("create folder", folder))?;
        }
        Adapter::zeros(adapter.config().clone())?.save(&zeros)?;
        let options = FoldOptions { carry: Carry::Link, ..FoldOptions::default() };
        fold_adapters(&base, &[(name_of(&zeros), zeros)], options, &folded)?;
        (folded.join(MODEL_NAME), vec![NamedGiven::new(); lineup.given.len()])
    };
    for chosen in chosen {
        let name = chosen.name.clone();
        check.no_op(NoOpPair { name, base: chosen.open(&base), folded: chosen.open_given(&folded, &given) });
    }
    Ok(())
}
