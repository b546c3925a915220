//! A command line as a shell reads it.

/// The command line of this process, for reports: pasted into a POSIX shell it runs the same command. Bytes of an argument that are no
/// text cannot stand in a report, and are replaced.
pub(super) fn command_line() -> String {
    let args = std::env::args_os().skip(1).map(|arg| quoted(&arg.to_string_lossy()));
    std::iter::once("prefold".to_owned()).chain(args).collect::<Vec<_>>().join(" ")
}

/// An argument, in quotes where a shell would read it otherwise.
fn quoted(arg: &str) -> String {
    let is_plain = |c: char| c.is_alphanumeric() || "_-./=:,+@%".contains(c);
    if !arg.is_empty() && arg.chars().all(is_plain) {
        return arg.to_owned();
    }
    format!("'{}'", arg.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_a_shell_would_change_is_quoted() {
        for plain in ["--graph", "a/b-c_1.onnx", "--adapter=x:y", "modèle"] {
            assert_eq!(quoted(plain), plain);
        }
        assert_eq!(quoted(""), "''");
        assert_eq!(quoted("a b"), "'a b'");
        assert_eq!(quoted("it's $HOME"), r"'it'\''s $HOME'");
        for special in ["*", "~/x", "a;b", "a&b", "!1", "(a)", "a\nb", "`x`", r"a\b", "#a"] {
            assert_eq!(quoted(special), format!("'{special}'"));
        }
    }

    #[cfg(unix)]
    #[test]
    fn a_shell_reads_the_arguments_as_they_were() {
        for arg in ["", "a b", "it's", "$HOME `x` \"y\" \\ *", "a\n b"] {
            let script = format!("printf %s {}", quoted(arg));
            let output = std::process::Command::new("sh").args(["-c", &script]).output().unwrap();
            assert_eq!(String::from_utf8(output.stdout).unwrap(), arg);
        }
    }
}
