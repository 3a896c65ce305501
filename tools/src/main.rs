//! `kagami`: what an operator types.
//!
//! Every verb but `create`, `dump-metadata`, `check`, `demo`, `sim` and `completions` asks the daemon of
//! one node over its control socket; nothing here decides about data.

mod broken_pipe;
mod check;
mod client;
mod consent;
mod contents;
mod context;
mod create;
mod demo;
mod dump;
mod human;
mod link;
mod loss;
mod nbd_client;
mod occupants;
mod options;
mod output;
mod overwrite;
mod progress;
mod resync;
mod role;
mod sim;
mod status;
mod store;
mod updown;
mod verify;
mod wait;

use clap::{CommandFactory, Parser};
use options::{Options, Verb};
use std::process::ExitCode;

fn main() -> ExitCode {
    broken_pipe::end_quietly();
    // A wrong command line ends here, with exit code 2.
    let options = Options::parse();
    match run(options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(refusal) => {
            eprintln!("kagami: {refusal}");
            ExitCode::from(refusal.id.exit_code() as u8)
        }
    }
}

fn run(options: Options) -> Result<(), mirror_core::error::Refusal> {
    let place = &options.place;
    match options.verb {
        Verb::Check(args) => check::run(place, &args),
        Verb::Create(args) => create::run(place, &args),
        Verb::Up(args) => updown::up(place, &args),
        Verb::Down(args) => updown::down(place, &args),
        Verb::Status(args) => status::run(place, &args),
        Verb::Primary(args) => role::primary(place, &args),
        Verb::Secondary(args) => role::secondary(place, &args),
        Verb::Connect(args) => link::connect(place, &args),
        Verb::Disconnect(args) => link::disconnect(place, &args),
        Verb::Invalidate(args) => link::invalidate(place, &args),
        Verb::Resync(args) => resync::run(place, &args),
        Verb::Verify(args) => verify::run(place, &args),
        Verb::DumpMetadata(args) => dump::run(place, &args),
        Verb::Demo(args) => demo::run(&args),
        Verb::Sim(args) => sim::run(&args),
        Verb::Completions(args) => {
            clap_complete::generate(
                args.shell,
                &mut Options::command(),
                "kagami",
                &mut std::io::stdout(),
            );
            Ok(())
        }
    }
}
