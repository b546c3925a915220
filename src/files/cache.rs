//! Where downloads are kept.

use std::ffi::OsString;
use std::path::PathBuf;

use etcetera::BaseStrategy;

use super::{Error, Result};

/// The environment variable that names prefold's cache folder.
const CACHE_VARIABLE: &str = "PREFOLD_CACHE";

/// prefold's cache folder: `PREFOLD_CACHE` if it is set, else `prefold` in the platform's user cache folder. It need not
/// exist yet.
///
/// # Errors
/// When the variable is unset and the user has no home folder.
pub fn cache_folder() -> Result<PathBuf> {
    choose(std::env::var_os(CACHE_VARIABLE), || {
        let strategy = etcetera::choose_base_strategy()
            .map_err(|error| Error::NoCacheFolder { reason: format!("{CACHE_VARIABLE} is unset and {error}") })?;
        Ok(strategy.cache_dir())
    })
}

fn choose(variable: Option<OsString>, user_cache: impl FnOnce() -> Result<PathBuf>) -> Result<PathBuf> {
    match variable.filter(|value| !value.is_empty()) {
        Some(folder) => Ok(folder.into()),
        None => Ok(user_cache()?.join("prefold")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_variable_comes_before_the_user_cache() {
        let user = || Ok(PathBuf::from("/home/u/.cache"));
        assert_eq!(choose(Some("/data/p".into()), user).unwrap(), PathBuf::from("/data/p"));
        assert_eq!(choose(Some("".into()), user).unwrap(), PathBuf::from("/home/u/.cache/prefold"));
        assert_eq!(choose(None, user).unwrap(), PathBuf::from("/home/u/.cache/prefold"));
        let homeless = || Err(Error::NoCacheFolder { reason: "no home".into() });
        assert!(matches!(choose(None, homeless), Err(Error::NoCacheFolder { .. })));
    }
}
