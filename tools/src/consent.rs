//! A step that loses data is taken only on the operator's word, after being told what is lost.
//!
//! On a terminal the word is `yes`, in full, as operators of DRBD know it: a reflex is no answer.
//! Who cannot be asked, a script, says `--yes`.

use clap::Args;
use mirror_core::error::{ErrorId, Refusal};
use std::io::{self, BufRead, IsTerminal};

/// The longest answer that is read.
const LONGEST_ANSWER: u64 = 64;

/// What the command line says about being asked.
#[derive(Args, Clone, Copy, Debug, Default)]
pub struct Consent {
    /// Do not ask before a step that loses data.
    #[arg(long, short)]
    yes: bool,
}

impl Consent {
    /// Whether the command line consents to what it says.
    pub fn is_given(self) -> bool {
        self.yes
    }

    /// Consent to this loss: given, or asked for. The loss is one line without a full stop.
    pub fn obtain(self, loss: &str) -> Result<(), Refusal> {
        if self.is_given() {
            return Ok(());
        }
        // The question goes to standard error: who does not see it must not answer it.
        if !(io::stdin().is_terminal() && io::stderr().is_terminal()) {
            return Err(Refusal::new(
                ErrorId::ConsentNeeded,
                format!("{loss}; nothing was done, pass --yes to go on without a question"),
            ));
        }
        eprint!("{loss}.\nType yes to go on: ");
        if agrees(io::stdin().lock()) {
            Ok(())
        } else {
            Err(Refusal::new(
                ErrorId::Declined,
                "nothing was done; answer yes in full, or pass --yes",
            ))
        }
    }
}

fn agrees(answers: impl BufRead) -> bool {
    let mut answer = String::new();
    let read = answers.take(LONGEST_ANSWER).read_line(&mut answer);
    read.is_ok() && answer.trim().eq_ignore_ascii_case("yes")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_whole_word_agrees() {
        for (answer, agreed) in [
            ("yes\n", true),
            (" YES \n", true),
            ("yes", true),
            ("y\n", false),
            ("\n", false),
            ("", false),
            ("no\nyes\n", false),
            ("yes, do it\n", false),
        ] {
            assert_eq!(agrees(answer.as_bytes()), agreed, "{answer:?}");
        }
        assert!(!agrees(&b"\xff\xfe\n"[..]));
        let late = [&[b' '; 1 << 10][..], b"yes\n"].concat();
        assert!(!agrees(&late[..]));
    }
}
