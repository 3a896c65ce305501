//! The command line: global options and the list of verbs. Each verb's own options stand beside
//! its code.

use crate::{check, create, demo, dump, link, resync, role, sim, status, updown, verify};
use clap::{Args, Parser, Subcommand};
use std::path::PathBuf;

const AFTER_HELP: &str = "\
Exit codes:
  0  done
  1  refused, or tried and failed
  2  the command line or the configuration is wrong
  3  the daemon of this node cannot be reached
  4  not possible in this state; the message says which state and what to do

Errors carry an id like KGM-0302; docs/errors.md explains each.

Examples:
  kagami demo --script             see two nodes fail and recover on this machine
  kagami create r0                 on both nodes, then
  kagami primary r0 --initial      on the one whose data is to be kept
  kagami status r0";

/// Keep a disk identical on two nodes, use it on either, lose either.
#[derive(Parser, Debug)]
#[command(name = "kagami", version, after_help = AFTER_HELP, max_term_width = 100)]
pub struct Options {
    /// Where Kagami's files are and which node this is.
    #[command(flatten)]
    pub place: Place,

    /// What to do.
    #[command(subcommand)]
    pub verb: Verb,
}

/// Which configuration, which node.
#[derive(Args, Debug, Clone)]
#[command(next_help_heading = "Which node")]
pub struct Place {
    /// The configuration file, the same on every node.
    #[arg(
        long,
        global = true,
        env = "KAGAMI_CONFIG",
        value_name = "FILE",
        default_value = "/etc/kagami/kagami.toml"
    )]
    pub config: PathBuf,

    /// This node's name in the configuration [default: the host name].
    #[arg(long, global = true, env = "KAGAMI_NODE", value_name = "NODE")]
    pub node: Option<String>,
}

/// The verbs, in the order in which a newcomer meets them; each says what it does beside its code.
#[derive(Subcommand, Debug)]
#[allow(missing_docs)]
pub enum Verb {
    Demo(demo::DemoArgs),
    Sim(sim::SimArgs),
    Check(check::CheckArgs),
    Create(create::CreateArgs),
    Up(updown::UpArgs),
    Down(updown::DownArgs),
    Status(status::StatusArgs),
    Primary(role::PrimaryArgs),
    Secondary(role::SecondaryArgs),
    Connect(link::ConnectArgs),
    Disconnect(link::DisconnectArgs),
    Invalidate(link::InvalidateArgs),
    Resync(resync::ResyncArgs),
    Verify(verify::VerifyArgs),
    DumpMetadata(dump::DumpArgs),
    Completions(CompletionsArgs),
}

/// Print a completion script for a shell.
///
/// It goes to standard output; where it belongs depends on the shell.
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  \
    kagami completions bash > /usr/share/bash-completion/completions/kagami\n  \
    kagami completions zsh > ~/.zfunc/_kagami")]
pub struct CompletionsArgs {
    /// For which shell.
    #[arg(value_enum)]
    pub shell: clap_complete::Shell,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Options::command().debug_assert();
    }

    #[test]
    fn the_help_documents_the_exit_codes() {
        let help = Options::command().render_help().to_string();
        for line in [
            "  0  done",
            "  1  refused, or tried and failed",
            "  2  the command line or the configuration is wrong",
            "  3  the daemon of this node cannot be reached",
            "  4  not possible in this state",
        ] {
            assert!(help.contains(line), "{line}\n{help}");
        }
    }

    #[test]
    fn every_verb_has_a_sentence_and_an_example() {
        for verb in Options::command().get_subcommands_mut() {
            let name = verb.get_name().to_owned();
            let help = verb.render_long_help().to_string();
            assert!(verb.get_about().is_some(), "{name}");
            assert!(help.contains("Examples:\n  kagami "), "{name}\n{help}");
        }
    }

    #[test]
    fn globals_may_follow_the_verb() {
        let options =
            Options::try_parse_from(["kagami", "status", "r0", "--config", "/k", "--node", "b"])
                .unwrap();
        assert_eq!(options.place.config, PathBuf::from("/k"));
        assert_eq!(options.place.node.as_deref(), Some("b"));
    }

    #[test]
    fn what_does_not_go_together_is_refused() {
        for line in [
            "primary r0 --assume-clean",
            "primary r0 --initial --force",
            "status --json --wait-for",
            "status --timeout 3",
            "resync",
            "create r0 --size 1GB",
            "frobnicate",
        ] {
            let words = ["kagami"].into_iter().chain(line.split(' '));
            let error = Options::try_parse_from(words).expect_err(line);
            assert_eq!(error.exit_code(), 2, "{line}");
        }
    }
}
