//! `kagami demo` without a script: two nodes to play with, and how they do.

use super::cluster::Cluster;
use super::interrupt;
use super::plan::{MIRROR, NODES};
use crate::human;
use crate::output;
use crate::wait::Goal;
use mirror_core::control::{Command, PrimaryMode};
use mirror_core::error::Refusal;
use mirror_core::types::LinkState;
use std::path::Path;
use std::time::Duration;

const LOOK_EVERY: Duration = Duration::from_millis(500);

/// Brings both nodes up, explains what one can try, shows their state until Ctrl-C.
pub fn run(mut cluster: Cluster) -> Result<(), Refusal> {
    let result = bring_up(&mut cluster);
    if let Err(refusal) = result {
        for (node, (name, _)) in NODES.iter().enumerate() {
            for line in cluster.log_tail(node, 20) {
                eprintln!("{name}: {line}");
            }
        }
        return if interrupt::requested() {
            Ok(())
        } else {
            Err(refusal)
        };
    }
    output::line(guide(&cluster));
    watch(&cluster);
    output::line("\nstopping both nodes");
    for node in 0..2 {
        cluster.stop(node)?;
    }
    Ok(())
}

fn bring_up(cluster: &mut Cluster) -> Result<(), Refusal> {
    for node in 0..2 {
        cluster.start(node)?;
    }
    cluster.wait_for(0, Goal::Link(LinkState::Connected))?;
    // Two new sparse files are equal: nothing to copy.
    cluster.order(0, Command::Primary(PrimaryMode::InitialAssumeClean))?;
    cluster.wait_for(0, Goal::Synced).map(drop)
}

fn guide(cluster: &Cluster) -> String {
    let config = cluster.plan.config_file();
    let config = config.display();
    let socket = cluster.plan.nbd_socket(0);
    let uri = format!("nbd+unix:///{MIRROR}?socket={}", socket.display());
    let programs = std::env::current_exe().unwrap_or_default();
    let programs = programs.parent().unwrap_or(Path::new("."));
    format!(
        "\
Two nodes mirror {size} on this machine; a is Primary and serves it at

    {uri}

In another terminal, with the clients you have:

    nbdinfo '{uri}'
    qemu-io -f raw -c 'write -P 7 0 1M' -c 'read -P 7 0 1M' '{uri}'
    nbdcopy /etc/services '{uri}'
    fio --name=try --ioengine=nbd --uri='{uri}' --rw=randwrite --bs=4k --iodepth=32 --size=64M \\
        --verify=crc32c

Swap the roles, part the nodes, look at them:

    export KAGAMI_CONFIG={config} PATH=\"$PATH:{programs}\"
    kagami --node a secondary && kagami --node b primary
    kagami --node a disconnect; kagami --node a connect --wait
    kagami --node b status --json

Or kill a daemon and start it again; the logs are in {dir}:

    kagami-mirror --config {config} --node b

Ctrl-C ends the demo{removal}.
",
        programs = programs.display(),
        size = human::size(cluster.plan.size),
        dir = cluster.plan.dir.display(),
        removal = if cluster.plan.remove {
            " and removes its files"
        } else {
            ""
        },
    )
}

/// In place on a terminal; elsewhere a paragraph whenever something changed.
fn watch(cluster: &Cluster) {
    let mut shown = String::new();
    while !interrupt::requested() {
        let nodes = NODES.iter().enumerate().map(|(node, (name, _))| {
            let state = match cluster.status(node) {
                Ok(status) => human::paragraph(&status),
                Err(refusal) => format!("no answer ({})", refusal.id),
            };
            format!("{name}: {state}")
        });
        let text = nodes.collect::<Vec<_>>().join("\n");
        if text != shown {
            if output::on_terminal() && !shown.is_empty() {
                // Up to where the last one began, and clear from there on.
                output::line(format!(
                    "\x1b[{}A\x1b[J{text}",
                    rows(&shown, output::columns())
                ));
            } else {
                output::line(&text);
            }
            shown = text;
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

/// How many rows of a terminal a text takes: long lines wrap.
fn rows(text: &str, columns: usize) -> usize {
    let rows_of = |line: &str| line.chars().count().div_ceil(columns.max(1)).max(1);
    text.lines().map(rows_of).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_lines_take_more_rows() {
        for (text, rows_of_text) in [
            ("", 0),
            ("a", 1),
            ("a\n\nb", 3),
            ("12345", 1),
            ("123456\n1", 3),
        ] {
            assert_eq!(rows(text, 5), rows_of_text, "{text:?}");
        }
    }
}
