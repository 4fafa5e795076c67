//! What a producer's status endpoint does wrong decides nothing, does not count, and costs
//! the other producers nothing.

use std::collections::BTreeSet;
use std::time::Duration;

use handfast_proto::v1::{
    CheckResponse, CountsRequest, NewMessage, PrepareRequest, Verdict, VerdictKind,
};
use handfast_tests::books::Message;
use handfast_tests::clients::{message, name_of};
use handfast_tests::database::number;
use handfast_tests::status::{Behaviour, StatusStub};
use handfast_tests::{Config, Engines, Party, World, eventually, on_both_engines};
use uuid::Uuid;

on_both_engines! {
    a_producer_that_is_away_keeps_its_messages_until_it_is_back,
    a_producer_that_hangs_holds_up_nobody_else,
    a_producer_that_cannot_tell_is_asked_again_and_again,
    a_reply_without_a_usable_verdict_does_not_count,
    in_one_reply_what_is_right_is_decided_and_what_is_wrong_is_left,
}

/// A producer whose endpoint answers as it should.
const SOUND: &str = "sound";
const SOUND_PORT: u16 = 8_000;
const TOPIC: &str = "fact";
const SOON: Duration = Duration::from_secs(20);

/// A service that knows these producers, on the ports after [`SOUND_PORT`], and a sound one.
struct Scene {
    world: World,
    sound: StatusStub,
}

impl Scene {
    async fn of(engines: Engines, producers: &[&str]) -> Self {
        Self::with(engines, producers, |config| config).await
    }

    async fn with(
        engines: Engines,
        producers: &[&str],
        change: impl FnOnce(Config) -> Config,
    ) -> Self {
        let mut world = World::bare(engines, Config::empty());
        let mut config = Config::empty()
            .topic(TOPIC)
            .subscription("reader", TOPIC)
            .producer(SOUND, world.address(SOUND_PORT));
        for (producer, port) in producers.iter().zip(SOUND_PORT + 1..) {
            config = config.producer(producer, world.address(port));
        }
        world.config = change(config);
        let committed = Behaviour::Says(VerdictKind::Committed);
        let sound = StatusStub::start(world.address(SOUND_PORT), committed).await;
        world.start(Party::Service).await;
        Self { world, sound }
    }

    /// A status endpoint for the first of the producers.
    async fn stub(&self, behaviour: Behaviour) -> StatusStub {
        StatusStub::start(self.world.address(SOUND_PORT + 1), behaviour).await
    }

    async fn prepared(&self, producer: &str) -> Vec<u8> {
        let message = message(TOPIC);
        let prepared = self.world.raw(producer).prepare(&message).await;
        prepared.expect("a prepare is accepted");
        message.id
    }

    async fn stored(&self, id: &[u8]) -> Message {
        let mut messages = self.world.books().await.messages;
        messages.retain(|message| message.id == id);
        assert_eq!(messages.len(), 1, "{} is stored once", name_of(id));
        messages.remove(0)
    }

    async fn is_unreachable(&self, producer: &str) -> bool {
        let counts = self.world.console().counts(CountsRequest {}).await;
        let producers = counts.expect("an answer").into_inner().producers;
        let found = producers.into_iter().find(|p| p.producer == producer);
        found.is_some_and(|producer| producer.unreachable)
    }

    async fn until_unreachable(&self, producer: &str, expected: bool) {
        let what = format!("unreachable of {producer} is {expected}");
        eventually(what, SOON, async || {
            let seen = self.is_unreachable(producer).await;
            (seen == expected)
                .then_some(())
                .ok_or_else(|| format!("it is {seen}"))
        })
        .await;
    }

    async fn until_confirmed_by_check(&self, id: &[u8]) {
        let what = format!("a check confirms {}", name_of(id));
        eventually(what, SOON, async || {
            let found = self.stored(id).await;
            match (found.state.as_str(), found.decided_by.as_deref()) {
                ("CONFIRMED", Some("CHECK")) => Ok(()),
                ("PREPARED", None) => Err(format!("PREPARED after {} checks", found.checks)),
                other => panic!("{} is {other:?}", name_of(id)),
            }
        })
        .await;
    }

    /// Nothing was decided and nothing was counted.
    async fn is_untouched(&self, id: &[u8]) {
        let found = self.stored(id).await;
        let seen = (found.state.as_str(), found.checks);
        assert_eq!(seen, ("PREPARED", 0), "{}", name_of(id));
    }

    /// The sound producer's messages are checked and confirmed at this moment.
    async fn others_are_decided(&self) {
        let before = self.sound.calls();
        let id = self.prepared(SOUND).await;
        self.until_confirmed_by_check(&id).await;
        assert!(self.sound.calls() > before, "it was asked");
    }
}

async fn a_producer_that_is_away_keeps_its_messages_until_it_is_back(engines: Engines) {
    let scene = Scene::of(engines, &["away"]).await;
    let id = scene.prepared("away").await;
    scene.until_unreachable("away", true).await;
    scene.others_are_decided().await;
    scene.is_untouched(&id).await;
    assert!(!scene.is_unreachable(SOUND).await);

    let back = Behaviour::Says(VerdictKind::Committed);
    let stub = scene.stub(back).await;
    scene.until_confirmed_by_check(&id).await;
    scene.until_unreachable("away", false).await;
    let asked = stub.asked();
    assert!(asked.iter().all(|question| question.message_id == id));
    assert_eq!(stub.calls(), 1, "the first answer is the verdict");
}

async fn a_producer_that_hangs_holds_up_nobody_else(engines: Engines) {
    // Long enough for the other producer to be checked during one hanging call.
    let slow = |config: Config| config.server("check_call_ms", 6_000);
    let scene = Scene::with(engines, &["hangs"], slow).await;
    let stub = scene.stub(Behaviour::Hangs).await;
    let id = scene.prepared("hangs").await;
    eventually("it is asked", SOON, async || {
        (stub.calls() == 1).then_some(()).ok_or_else(String::new)
    })
    .await;
    scene.others_are_decided().await;
    let hanging = stub.calls() == 1 && !scene.is_unreachable("hangs").await;
    assert!(hanging, "the others were decided during the first call");

    scene.until_unreachable("hangs", true).await;
    scene.is_untouched(&id).await;
    stub.behaves(Behaviour::Says(VerdictKind::Committed));
    scene.until_confirmed_by_check(&id).await;
    scene.until_unreachable("hangs", false).await;
}

async fn a_producer_that_cannot_tell_is_asked_again_and_again(engines: Engines) {
    let scene = Scene::of(engines, &["unsure"]).await;
    let stub = scene.stub(Behaviour::Says(VerdictKind::Unknown)).await;
    let id = scene.prepared("unsure").await;
    eventually("three checks count", SOON, async || {
        let found = scene.stored(&id).await;
        assert_eq!(found.state, "PREPARED", "unknown is no verdict");
        (found.checks >= 3)
            .then_some(())
            .ok_or_else(|| format!("{} count", found.checks))
    })
    .await;
    assert!(stub.calls() >= 3, "each of them was a call");
    assert!(!scene.is_unreachable("unsure").await, "it does answer");
    scene.others_are_decided().await;

    stub.behaves(Behaviour::Says(VerdictKind::Committed));
    scene.until_confirmed_by_check(&id).await;
}

async fn a_reply_without_a_usable_verdict_does_not_count(engines: Engines) {
    let behaviours = [
        ("fails", Behaviour::Fails),
        ("omits", Behaviour::Omits),
        ("speaks-of-others", Behaviour::SpeaksOfOthers),
        ("contradicts-itself", Behaviour::ContradictsItself),
        ("floods", Behaviour::Floods),
        ("babbles", Behaviour::Babbles),
        ("leaves-unset", Behaviour::Says(VerdictKind::Unspecified)),
    ];
    let names = behaviours.each_ref().map(|(name, _)| *name);
    let scene = Scene::of(engines, &names).await;
    let mut odd = Vec::new();
    for ((name, behaviour), port) in behaviours.into_iter().zip(SOUND_PORT + 1..) {
        let stub = StatusStub::start(scene.world.address(port), behaviour).await;
        odd.push((name, stub, scene.prepared(name).await));
    }
    for (name, stub, _) in &odd {
        eventually(format!("{name} is asked twice"), SOON, async || {
            let calls = stub.calls();
            (calls >= 2)
                .then_some(())
                .ok_or_else(|| format!("{calls} calls"))
        })
        .await;
    }
    scene.others_are_decided().await;
    for (name, stub, id) in &odd {
        scene.is_untouched(id).await;
        scene.until_unreachable(name, true).await;
        stub.behaves(Behaviour::Says(VerdictKind::Committed));
    }
    for (_, _, id) in &odd {
        scene.until_confirmed_by_check(id).await;
    }
    let stored = scene.world.books().await.messages.len();
    assert_eq!(stored, odd.len() + 1, "ids of others became no messages");
}

async fn in_one_reply_what_is_right_is_decided_and_what_is_wrong_is_left(engines: Engines) {
    let mut scene = Scene::of(engines, &["mixed"]).await;
    let id = || Uuid::now_v7().as_bytes().to_vec();
    let (committed, rolled_back) = (id(), id());
    let (missing, repeated, babbled) = (id(), id(), id());
    let verdict = |id: &[u8], kind: i32| Verdict {
        message_id: id.to_vec(),
        kind,
    };
    let [yes, no] = [VerdictKind::Committed, VerdictKind::RolledBack].map(i32::from);
    let verdicts = vec![
        verdict(&id(), yes),
        verdict(&repeated, yes),
        verdict(&committed, yes),
        verdict(&babbled, 77),
        verdict(b"no id", yes),
        verdict(&repeated, yes),
        verdict(&rolled_back, no),
    ];
    let reply = Behaviour::Replies(CheckResponse { verdicts });
    let stub = scene.stub(reply).await;

    let ids = [&committed, &missing, &repeated, &rolled_back, &babbled];
    let prepare = PrepareRequest {
        producer: "mixed".to_owned(),
        messages: ids
            .iter()
            .map(|id| NewMessage {
                id: id.to_vec(),
                ..message(TOPIC)
            })
            .collect(),
    };
    let prepared = scene.world.messages().prepare(prepare).await;
    prepared.expect("an answer");
    // All of them are due when it goes on, so that they are asked about in one call.
    scene.world.freeze(Party::Service);
    let db = scene.world.database("service").await;
    eventually("all five are due", SOON, async || {
        let due = format!(
            "SELECT count(*) FROM message WHERE state = 'PREPARED' AND check_at < {}",
            db.ago(0)
        );
        let due = number(&db, &due).await;
        (due == 5).then_some(()).ok_or_else(|| format!("{due} are"))
    })
    .await;
    db.close().await;
    assert_eq!(stub.calls(), 0, "nothing was asked before");
    scene.world.thaw(Party::Service);

    scene.until_confirmed_by_check(&committed).await;
    let cancelled = scene.stored(&rolled_back).await;
    assert_eq!(cancelled.state, "CANCELLED");
    assert_eq!(cancelled.decided_by.as_deref(), Some("CHECK"));
    let asked = stub.asked().into_iter().map(|question| question.message_id);
    let first: BTreeSet<_> = asked.take(5).collect();
    assert_eq!(first, ids.into_iter().cloned().collect(), "in one call");
    for id in [&missing, &repeated, &babbled] {
        scene.is_untouched(id).await;
    }
    stub.behaves(Behaviour::Says(VerdictKind::Committed));
    for id in [&missing, &repeated, &babbled] {
        scene.until_confirmed_by_check(id).await;
    }
}
