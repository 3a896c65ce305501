//! Commands that lose data, as a person at a terminal and as a script meet them, before a daemon that
//! only notes what it was asked.

mod host;

use host::Host;
use mirror_core::control::{
    self, Command, CommandOutcome, MirrorStatus, NodeStatus, PrimaryMode, Request, Response,
};
use mirror_core::meta::superblock::{Superblock, Trust};
use mirror_core::meta::{Layout, META_BLOCK, SLOTS};
use mirror_core::node::MetadataPlace;
use mirror_core::types::{
    DiskState, Generation, GenerationId, Holders, LinkState, ReplicaId, Role,
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::openpty;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Stdio;
use std::thread::JoinHandle;

/// The daemon of node `a`: one connection.
struct Daemon {
    thread: JoinHandle<Vec<Command>>,
}

impl Daemon {
    /// With a mirror in this state.
    fn start(host: &Host, status: MirrorStatus) -> Daemon {
        let socket = host.path("a-mirror.sock");
        let _ = std::fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket).unwrap();
        let thread = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut commands = Vec::new();
            while let Some(request) = receive(&mut stream) {
                let response = match request {
                    Request::Hello { .. } => Response::Welcome {
                        node: "a".to_owned(),
                        version: "0".to_owned(),
                        pid: 1,
                    },
                    Request::Status { .. } => Response::Status(NodeStatus {
                        schema: 1,
                        node: "a".to_owned(),
                        mirrors: vec![status.clone()],
                    }),
                    Request::Mirror { command, .. } => {
                        commands.push(command);
                        Response::Done(CommandOutcome::default())
                    }
                    Request::Up { .. } => unreachable!("nothing is brought up here"),
                };
                stream
                    .write_all(&control::encode(&response).unwrap())
                    .unwrap();
            }
            commands
        });
        Daemon { thread }
    }

    /// What it was told to do.
    fn told(self) -> Vec<Command> {
        self.thread.join().unwrap()
    }
}

fn receive(stream: &mut UnixStream) -> Option<Request> {
    let mut prefix = [0; 4];
    stream.read_exact(&mut prefix).ok()?;
    let mut body = vec![0; control::decode_length(prefix).unwrap()];
    stream.read_exact(&mut body).ok()?;
    Some(control::decode(&body).unwrap())
}

/// A split brain, seen from the side that is behind.
fn apart() -> MirrorStatus {
    MirrorStatus {
        name: "r0".to_owned(),
        role: Role::Secondary,
        disk: DiskState::Consistent,
        link: LinkState::StandAlone,
        generation: "3:0123456789abcdef".to_owned(),
        size_bytes: 1 << 30,
        dirty_bytes: 12 << 20,
        ..MirrorStatus::default()
    }
}

fn in_sync() -> MirrorStatus {
    MirrorStatus {
        disk: DiskState::UpToDate,
        peer_role: Role::Secondary,
        peer_disk: DiskState::UpToDate,
        link: LinkState::Connected,
        dirty_bytes: 0,
        ..apart()
    }
}

const FORCE: Command = Command::Primary(PrimaryMode::Force);
const PLAIN: Command = Command::Primary(PrimaryMode::Ordinary);
const DISCARD: Command = Command::Connect {
    discard_my_data: true,
};
const CONNECT: Command = Command::Connect {
    discard_my_data: false,
};

/// A command line, the mirror's state, what is said to be lost, what the daemon is told with consent.
type Row = (&'static str, fn() -> MirrorStatus, &'static str, Command);

const TABLE: &[Row] = &[
    (
        "primary r0 --force",
        apart,
        "acknowledged writes that are not in it",
        FORCE,
    ),
    (
        "connect r0 --discard-my-data",
        apart,
        "written only here, at most 12 MiB, is lost",
        DISCARD,
    ),
    (
        "invalidate r0",
        apart,
        "this copy (1 GiB, Consistent) is thrown away",
        Command::Invalidate,
    ),
    (
        "invalidate r0",
        in_sync,
        "the peer is Secondary, UpToDate",
        Command::Invalidate,
    ),
];

#[test]
fn a_script_is_refused_until_it_says_yes() {
    for (line, status, loss, command) in TABLE {
        let host = Host::new("internal");
        let daemon = Daemon::start(&host, status());
        let said = host.refused(line, 2, "KGM-0111");
        assert!(said.contains(loss), "{line}: {said}");
        assert!(
            said.contains("r0: ") && said.contains("pass --yes"),
            "{line}: {said}"
        );
        assert_eq!(daemon.told(), [], "{line}");

        let daemon = Daemon::start(&host, status());
        host.done(&format!("{line} --yes"));
        assert_eq!(daemon.told(), [*command], "{line}");
    }
}

#[test]
fn a_person_is_asked() {
    for (line, status, loss, command) in TABLE {
        for (answer, code) in [("yes\n", 0), ("y\n", 1), ("\n", 1), ("\u{4}", 1)] {
            let host = Host::new("internal");
            let daemon = Daemon::start(&host, status());
            let (ended, shown) = at_a_terminal(&host, line, answer);
            assert_eq!(ended, Some(code), "{line}, answered {answer:?}: {shown}");
            assert!(shown.contains(loss), "{line}: {shown}");
            assert!(shown.contains("Type yes to go on: "), "{line}: {shown}");
            assert_eq!(shown.contains("KGM-0109"), code == 1, "{shown}");
            let expected = if code == 0 { vec![*command] } else { vec![] };
            assert_eq!(daemon.told(), expected, "{line}, answered {answer:?}");
        }
    }
}

/// Then the plain command is given: should the state change meanwhile, nothing is lost unasked.
#[test]
fn where_nothing_is_lost_nobody_is_asked() {
    let primary = || MirrorStatus {
        role: Role::Primary,
        ..in_sync()
    };
    let sole = || MirrorStatus {
        link: LinkState::StandAlone,
        ..in_sync()
    };
    let new = || MirrorStatus {
        generation: String::new(),
        ..apart()
    };
    for (line, status, command) in [
        ("primary r0", apart(), PLAIN),
        ("primary r0 --force", primary(), PLAIN),
        ("primary r0 --force", sole(), PLAIN),
        ("connect r0", apart(), CONNECT),
        ("connect r0 --discard-my-data", in_sync(), CONNECT),
        ("connect r0 --discard-my-data", new(), CONNECT),
        ("secondary r0", primary(), Command::Secondary),
        ("disconnect r0", in_sync(), Command::Disconnect),
    ] {
        let host = Host::new("internal");
        let daemon = Daemon::start(&host, status);
        host.done(line);
        assert_eq!(daemon.told(), [command], "{line}");
    }
}

/// A replica that has served has a history, which `create --force` ends.
#[test]
fn a_history_is_not_forgotten_unasked() {
    let host = Host::new("internal");
    let size = 64 << 20;
    host.done("create --size 64MiB");
    let layout = Layout::new(size, MetadataPlace::Internal).unwrap();
    let mut disk = std::fs::read(host.path("a.img")).unwrap();
    for slot in 0..SLOTS {
        let at = layout.slot_offset(slot) as usize;
        let superblock = Superblock {
            sequence: slot,
            cluster: "c".to_owned(),
            mirror_name: "r0".to_owned(),
            node: "a".to_owned(),
            generation: Generation {
                counter: 7,
                id: GenerationId(1 << 96),
            },
            holders: Holders::Sole,
            trust: Trust::UpToDate,
            ..Superblock::unborn(ReplicaId(9), layout.data_size)
        };
        disk[at..at + META_BLOCK as usize].copy_from_slice(&superblock.encode());
    }
    std::fs::write(host.path("a.img"), &disk).unwrap();
    host.refused("create --yes", 4, "KGM-0208");
    let said = host.refused("create --force", 2, "KGM-0111");
    for part in [
        "generation 7:00000001, recorded as UpToDate",
        "the only one with the last acknowledged writes",
    ] {
        assert!(said.contains(part), "{said}");
    }
    let (ended, shown) = at_a_terminal(&host, "create --force", "no\n");
    assert_eq!(ended, Some(1), "{shown}");
    assert!(shown.contains("KGM-0109"), "{shown}");
    assert!(
        std::fs::read(host.path("a.img")).unwrap() == disk,
        "it was changed"
    );
    let (ended, shown) = at_a_terminal(&host, "create --force", "yes\n");
    assert_eq!(ended, Some(0), "{shown}");
    // The new replica has no history: nobody is asked.
    host.done("create --force");
}

/// Runs a command on a terminal, answers its question, and returns its exit code and what was shown.
fn at_a_terminal(host: &Host, line: &str, answer: &str) -> (Option<i32>, String) {
    let pty = openpty(None, None).unwrap();
    let end = || Stdio::from(pty.slave.try_clone().unwrap());
    let mut command = host.command(line);
    command.stdin(end()).stdout(end()).stderr(end());
    let mut child = command.spawn().unwrap();
    drop(command);
    drop(pty.slave);
    let mut terminal = File::from(pty.master);
    let mut shown = Vec::new();
    let mut answered = false;
    // The read fails when the command, the last user of the other end, has ended.
    while let Ok(1..) = read_some(&mut terminal, &mut shown) {
        if !answered && String::from_utf8_lossy(&shown).contains("go on: ") {
            terminal.write_all(answer.as_bytes()).unwrap();
            answered = true;
        }
    }
    let status = child.wait().unwrap();
    (status.code(), String::from_utf8_lossy(&shown).into_owned())
}

/// Reads what there is; a command that neither asks nor ends is an error.
fn read_some(terminal: &mut File, shown: &mut Vec<u8>) -> std::io::Result<usize> {
    let mut ready = [PollFd::new(terminal.as_fd(), PollFlags::POLLIN)];
    let patience = PollTimeout::try_from(30_000).unwrap();
    assert_ne!(
        poll(&mut ready, patience)?,
        0,
        "{}",
        String::from_utf8_lossy(shown)
    );
    let mut bytes = [0; 4096];
    let count = terminal.read(&mut bytes)?;
    shown.extend(&bytes[..count]);
    Ok(count)
}
